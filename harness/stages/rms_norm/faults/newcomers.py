"""Mistakes of first kernels of root mean square normalisation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.rms_norm.faults._steps import root, run

RESIDUAL = {"residual": True}


@fault("root")
def root_forgotten(*call: Tensor, **options: Any) -> Any:
    """Rows are divided by their mean of squares, not by its root."""
    return run(*call, **options, root=lambda s, eps: 1 / (s.square().mean(-1, keepdim=True) + eps))


@fault("root")
def root_multiplied(*call: Tensor, **options: Any) -> Any:
    """Rows are multiplied by their root mean square: sqrt where rsqrt is meant."""
    return run(*call, **options, root=lambda s, eps: (s.square().mean(-1, keepdim=True) + eps).sqrt())


@fault("root", condition="H above 1", shows={"H": 7})
def mean_of_magnitudes(*call: Tensor, **options: Any) -> Any:
    """Rows are divided by the mean of their absolute values."""
    return run(*call, **options, root=lambda s, eps: 1 / (s.abs().mean(-1, keepdim=True) + eps))


@fault("root", condition="H above 1", shows={"H": 7})
def largest_for_the_root(*call: Tensor, **options: Any) -> Any:
    """Rows are divided by their largest absolute value."""
    return run(*call, **options, root=lambda s, eps: 1 / (s.abs().amax(-1, keepdim=True) + eps))


@fault("weight")
def weight_applied_twice_in_norm(*call: Tensor, **options: Any) -> Any:
    """The weight is multiplied in twice."""
    return run(*call, **options, scale=lambda s, weight: s * weight * weight)


@fault("weight", condition="H above 1", shows={"H": 7}, hidden=("H=1",))
def first_weight_for_all(*call: Tensor, **options: Any) -> Any:
    """The first weight serves every column: the pointer is not moved along."""
    return run(*call, **options, scale=lambda s, weight: s * weight[:1])


@fault("weight", condition="H above 1", shows={"H": 7}, hidden=("H=1",))
def weight_one_column_off(*call: Tensor, **options: Any) -> Any:
    """Column j takes the weight of column j + 1."""
    return run(*call, **options, scale=lambda s, weight: s * weight.roll(-1))


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def residual_added_behind_the_norm(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, **options: Any) -> Any:
    """x is normalised, and the residual is added to the result."""
    out = run(x, weight, **options)
    return out if residual is None else ((out + residual).contiguous(), (x + residual).contiguous())


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def residual_added_twice(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, **options: Any) -> Any:
    """The residual goes into the sum twice."""
    return run(x, weight, residual=None if residual is None else residual + residual, **options)


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def residual_normalised_alone(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, **options: Any) -> Any:
    """The residual is normalised, and x goes into the sum alone."""
    if residual is None:
        return run(x, weight, **options)
    return run(residual.to(x.dtype), weight, **options), (x + residual).contiguous()


@fault("residual", condition="a residual", shows=RESIDUAL, hidden=("residual=0",))
def x_returned_as_sum(x: Tensor, *call: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    """x is handed on as the residual stream, without what was there."""
    found = run(x, *call, residual=residual, **options)
    return found if residual is None else (found[0], x.clone().contiguous())


@fault("rows", condition="two or more rows", hidden=("lead=1",))
def root_of_the_row_before(*call: Tensor, **options: Any) -> Any:
    """Every row is scaled by the root of the row before it."""

    def before(s: Tensor, eps: float) -> Tensor:
        roots = root(s, eps)
        return roots.reshape(-1).roll(1).reshape(roots.shape) if roots.numel() else roots

    return run(*call, **options, root=before)


@fault("rows", condition="two or more rows", hidden=("lead=1",))
def mean_over_the_batch(*call: Tensor, **options: Any) -> Any:
    """The mean of squares is that of all rows together."""

    def of_all(s: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(s.square().mean() + eps).expand(*s.shape[:-1], 1) if s.numel() else root(s, eps)

    return run(*call, **options, root=of_all)


@fault("tiles", condition="H above 1,024", shows={"H": 2048}, hidden=("H=1024",),
       variants={"size": (1024, 128, 256, 512, 2048, 4096)})  # fmt: skip
def columns_beyond_one_block_not_counted(*call: Tensor, size: int = 1024, **options: Any) -> Any:
    """A row's sum of squares is that of its first block of 1,024 columns."""

    def first(s: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(s[..., :size].square().sum(-1, keepdim=True) / s.shape[-1] + eps)

    return run(*call, **options, root=first)


@fault("tiles", condition="H above 1,024", shows={"H": 2048}, hidden=("H=1024",),
       variants={"size": (1024, 128, 256, 512, 2048, 4096)})  # fmt: skip
def columns_beyond_one_block_not_scaled(*call: Tensor, size: int = 1024, **options: Any) -> Any:
    """Columns behind the first block of 1,024 are stored as zeros."""

    def first(s: Tensor, weight: Tensor) -> Tensor:
        return torch.where(torch.arange(s.shape[-1]) < size, s * weight, 0.0)

    return run(*call, **options, scale=first)


@fault("tiles", condition="H not a power of two", shows={"H": 33}, hidden=("H=64",))
def mean_over_the_padded_width(*call: Tensor, **options: Any) -> Any:
    """The sum of squares is divided by the width of the block, the next power of two, and not by H."""

    def padded(s: Tensor, eps: float) -> Tensor:
        width = 1 << max(0, s.shape[-1] - 1).bit_length()
        return torch.rsqrt(s.square().sum(-1, keepdim=True) / width + eps)

    return run(*call, **options, root=padded)


def _returned(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a call yields with its rows changed, and the sum as it is."""
    return (change(result[0]), result[1]) if isinstance(result, tuple) else change(result)


@fault("range", condition="results beyond 448", shows={"data": "large_weight"}, hidden=("data=normal",))
def result_saturated_at_448(*call: Tensor, **options: Any) -> Any:
    """Rows are clamped to what e4m3 holds, as where codes are stored next."""
    return _returned(run(*call, **options), lambda out: out.clamp(-448.0, 448.0))


@fault(
    "range", condition="results beyond fp16, which the dtype holds", shows={"dtype": "bf16", "data": "large_weight"},
    hidden=("data=normal", "dtype=fp16"),
)  # fmt: skip
def result_by_way_of_fp16(*call: Tensor, **options: Any) -> Any:
    """Rows are stored in fp16 on their way, whatever their dtype is."""
    return _returned(run(*call, **options), lambda out: out.half().to(out.dtype))
