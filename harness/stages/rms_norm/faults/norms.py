"""Faults of root mean square normalisation: right steps, one replaced; `shows` and `hidden` name fields of a case."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import matmul_rounding_sums, read_as_contiguous, read_past, round_down, round_up
from moe_harness.harness.stages.rms_norm.faults._steps import root, run

RESIDUAL = {"residual": True}


@fault("root", condition="eps matters beside the mean of squares", shows={"data": "tiny"}, hidden=("data=normal",))
def eps_dropped(*call: Tensor, **options: Any) -> Any:
    """eps is not added: small rows come out too large, zero rows as NaN."""
    return run(*call, **options | {"eps": 0.0})


@fault("root", source="amd/IRON/pull/139", condition="eps is not 1e-5", shows={"data": "tiny"}, hidden=("eps=1e-05",))
def eps_hard_coded(*call: Tensor, **options: Any) -> Any:
    """eps is a constant of the kernel, and the model's is ignored."""
    return run(*call, **options | {"eps": 1e-5})


@fault("root", condition="eps matters beside the mean of squares", shows={"data": "tiny"})
def eps_outside_the_root(*call: Tensor, **options: Any) -> Any:
    """eps is added to the root instead of under it."""
    return run(*call, **options, root=lambda s, eps: 1 / (s.square().mean(-1, keepdim=True).sqrt() + eps))


@fault(
    "root",
    source="apple/coremltools/pull/2822",
    condition="a row whose largest value is not 1",
    shows={"data": "spike", "eps": 0.001},
)
def eps_after_rescaling(*call: Tensor, **options: Any) -> Any:
    """Rows are scaled by their maximum first, and eps is not."""

    def rescaled(s: Tensor, eps: float) -> Tensor:
        largest = s.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        return root(s / largest, eps) / largest

    return run(*call, **options, root=rescaled)


@fault(
    "root",
    source="nntrainer/nntrainer/pull/4318",
    condition="fp16 and eps below 1e-4",
    shows={"data": "tiny", "dtype": "fp16"},
    hidden=("dtype=fp32",),
)
def eps_floored_in_fp16(x: Tensor, *call: Tensor, **options: Any) -> Any:
    """eps is raised to 1e-4 so that it survives in fp16."""
    floor = 1e-4 if x.dtype == torch.float16 else 0.0
    return run(x, *call, **options | {"eps": max(options["eps"], floor)})


@fault("root")
def mean_forgotten(*call: Tensor, **options: Any) -> Any:
    """The sum of squares instead of their mean."""
    return run(*call, **options, root=lambda s, eps: torch.rsqrt(s.square().sum(-1, keepdim=True) + eps))


@fault("root", condition="rows whose mean is not 0", shows={"data": "offset"})
def layer_norm(*call: Tensor, **options: Any) -> Any:
    """The mean is subtracted, as in a layer norm."""

    return run(*call, **options, prepared=lambda s: s - s.mean(-1, keepdim=True))


@fault("root", condition="rows whose mean is not 0", shows={"data": "offset"})
def variance_for_mean_of_squares(*call: Tensor, **options: Any) -> Any:
    """Rows are divided by their standard deviation; their mean stays."""

    def centred(s: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(s.var(-1, correction=0, keepdim=True) + eps)

    return run(*call, **options, root=centred)


@fault("root", shows={"H": 7})
def mean_over_one_less(*call: Tensor, **options: Any) -> Any:
    """The mean is taken over H - 1."""

    def short(s: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(s.square().sum(-1, keepdim=True) / max(1, s.shape[-1] - 1) + eps)

    return run(*call, **options, root=short)


@fault(
    "root",
    source="xlite-dev/LeetCUDA/pull/335",
    condition="fp16 and squares beyond 65504",
    shows={"data": "spike", "dtype": "fp16"},
    hidden=("dtype=bf16", "data=normal"),
)
def squares_in_the_rows_dtype(x: Tensor, *call: Tensor, **options: Any) -> Any:
    """Squares are taken in the dtype of the rows: infinite in fp16, and the row comes out as 0."""

    def narrow(s: Tensor, eps: float) -> Tensor:
        squares = s.to(x.dtype).square() if x.dtype == torch.float16 else s.square()
        return torch.rsqrt(squares.float().mean(-1, keepdim=True) + eps)

    return run(x, *call, **options, root=narrow)


@fault("precision", condition="16 bits and long rows", shows={"H": 2048, "dtype": "bf16"}, hidden=("dtype=fp32",))
def squares_summed_in_16_bits(x: Tensor, *call: Tensor, **options: Any) -> Any:
    """The sum of squares is kept in 16 bits."""

    def short(s: Tensor, eps: float) -> Tensor:
        if x.dtype == torch.float32:
            return root(s, eps)
        ones = torch.ones(1, s.shape[-1], dtype=x.dtype)
        squares = s.square().reshape(-1, s.shape[-1])
        total = matmul_rounding_sums(squares, ones, x.dtype).reshape(*s.shape[:-1], 1)
        return torch.rsqrt(total.float() / s.shape[-1] + eps)

    return run(x, *call, **options, root=short)


@fault(
    "precision",
    source="amd/IRON/pull/139",
    condition="16 bits",
    shows={"dtype": "fp16", "H": 2048, "lead": "65"},
    hidden=("dtype=fp32",),
)
def root_in_16_bits(x: Tensor, *call: Tensor, **options: Any) -> Any:
    """The reciprocal root is rounded: every row is off by a factor of its own."""
    return run(x, *call, **options, root=lambda s, eps: root(s, eps).to(x.dtype).float())


@fault("weight")
def weight_dropped(*call: Tensor, **options: Any) -> Any:
    """The weight is left out."""
    return run(*call, **options, scale=lambda s, weight: s)


@fault("weight")
def one_added_to_the_weight(*call: Tensor, **options: Any) -> Any:
    """1 + weight, as Gemma's checkpoints mean it."""
    return run(*call, **options, scale=lambda s, weight: s * (1 + weight))


@fault("weight", condition="a strided weight", shows={"layout": "weight:strided"}, hidden=("layout=",))
def weight_stride_assumed(x: Tensor, weight: Tensor, **options: Any) -> Any:
    """The weight is read as contiguous."""
    return run(x, read_as_contiguous(weight), **options)


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def residual_not_normalised(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None,
                            **options: Any) -> Any:  # fmt: skip
    """The residual is not added before the norm."""
    out = run(x, weight, eps=eps, **options)
    return out if residual is None else (out, (x + residual).contiguous())


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def old_residual_returned(*call: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    """The old residual is handed on instead of the sum: the layer's output is lost to the stream."""
    found = run(*call, residual=residual, **options)
    return found if residual is None else (found[0], residual.clone().contiguous())


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def normalised_rows_returned_as_sum(*call: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    """The normalised rows become the residual stream."""
    found = run(*call, residual=residual, **options)
    return found if residual is None else (found[0], found[0].clone())


@fault(
    "residual",
    source="GeeeekExplorer/nano-vllm/pull/205",
    condition="a residual",
    shows=RESIDUAL,
    hidden=("residual=0",),
    sign="inputs",
)
def sum_written_into_x(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None,
                       **options: Any) -> Any:  # fmt: skip
    """The sum is written into x."""
    if residual is None:
        return run(x, weight, eps=eps, **options)
    x.add_(residual)
    return run(x, weight, eps=eps, **options), x.clone().contiguous()


@fault(
    "residual",
    source="GeeeekExplorer/nano-vllm/pull/169",
    condition="no residual, fp32",
    hidden=("residual=1",),
    sign="inputs",
)
def fp32_rows_normalised_in_place(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None,
                                  **options: Any) -> Any:  # fmt: skip
    """x.float() is x itself in fp32, and is normalised in place."""
    if residual is not None or x.dtype != torch.float32:
        return run(x, weight, eps=eps, residual=residual, **options)
    x.mul_(root(x, eps)).mul_(weight)
    return x.clone().contiguous()


@fault(
    "residual",
    source="GeeeekExplorer/nano-vllm/pull/169",
    condition="a residual",
    shows=RESIDUAL,
    hidden=("residual=0",),
    sign="earlier",
)
def sum_shares_the_residuals_memory(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None,
                                    **options: Any) -> Any:  # fmt: skip
    """The sum that is returned is the residual's own memory."""
    if residual is None:
        return run(x, weight, eps=eps, **options)
    out, total = run(x, weight, eps=eps, residual=residual, **options)
    return out, residual.copy_(total)


@fault("rows", condition="rows of x with a stride", shows={"layout": "x:padded"}, hidden=("layout=",))
def row_stride_assumed(x: Tensor, weight: Tensor, **options: Any) -> Any:
    """x is read at row * H: a slice of a projection gives other rows."""
    return run(read_as_contiguous(x), weight, **options)


@fault(
    "rows",
    condition="rows of the residual with a stride",
    shows={"layout": "residual:padded"} | RESIDUAL,
    hidden=("layout=",),
)
def residual_stride_assumed(*call: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    """The residual is read with the strides of x."""
    return run(*call, residual=None if residual is None else read_as_contiguous(residual), **options)


@fault("rows", condition="two or more rows", hidden=("lead=1",))
def root_of_the_first_row(*call: Tensor, **options: Any) -> Any:
    """All rows are scaled by the root of the first."""

    def first(s: Tensor, eps: float) -> Tensor:
        roots = root(s, eps)
        flat = roots.reshape(-1)
        return flat[:1].expand(len(flat)).reshape(roots.shape)

    return run(*call, **options, root=first)


@fault("rows", condition="three or more dimensions", shows={"lead": "2x3"}, hidden=("lead=6",))
def heads_normalised_together(*call: Tensor, **options: Any) -> Any:
    """The mean is taken over every dimension but the first: all heads of a token at once."""

    def together(s: Tensor, eps: float) -> Tensor:
        if s.dim() < 3 or not s.numel():
            return root(s, eps)
        mean = s.square().flatten(1).mean(-1).view(-1, *[1] * (s.dim() - 1))
        return torch.rsqrt(mean + eps).expand(*s.shape[:-1], 1)

    return run(*call, **options, root=together)


@fault("tiles", condition="H not a multiple of 16", shows={"H": 33}, hidden=("H=48",))
def tail_of_the_sum_dropped(*call: Tensor, **options: Any) -> Any:
    """The last, partial block does not enter the sum of squares."""

    def floored(s: Tensor, eps: float) -> Tensor:
        kept = round_down(s.shape[-1]) or s.shape[-1]
        return torch.rsqrt(s[..., :kept].square().sum(-1, keepdim=True) / s.shape[-1] + eps)

    return run(*call, **options, root=floored)


@fault(
    "tiles",
    condition="H not a multiple of 16, other memory behind the rows",
    shows={"H": 33, "layout": "x:padded"},
    hidden=("H=48",),
)
def tail_of_the_sum_unmasked(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None,
                             **options: Any) -> Any:  # fmt: skip
    """Whatever lies behind a row enters its sum of squares."""
    width = round_up(x.shape[-1])
    total = x if residual is None else x + residual
    behind = read_past(x, width)[..., x.shape[-1] :].float()

    def unmasked(s: Tensor, eps: float) -> Tensor:
        squares = s.square().sum(-1, keepdim=True) + behind.square().sum(-1, keepdim=True)
        return torch.rsqrt(squares / s.shape[-1] + eps)

    out = run(total, weight, eps=eps, root=unmasked, **options)
    return out if residual is None else (out, total.contiguous())
