"""Faults in the quantisation of activations."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.quantized_experts.faults._steps import quantised, run


def per_token(rows: Tensor, first: bool) -> Tensor:
    """Rows in fp8, a scale for each."""
    return quantised(rows)


def per_group(rows: Tensor, first: bool) -> Tensor:
    """Rows in fp8, a scale for each 128 columns."""
    return quantised(rows, width=128)


@fault(
    "quantisation",
    condition="activations are quantised, a row of zeros",
    shows={"data": "zero_rows", "I": 256},
    hidden=("data=exact",),
    quantizes="fp8_token",
    source="huggingface/kernels-community/issues/681",
)
def zero_rows_divided(*call: Any, **options: Any) -> Tensor:
    """The scale of a row of zeros is 0, and 0 / 0 is no number."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 448.0
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, small rows",
    shows={"data": "tiny", "I": 256},
    hidden=("data=exact",),
    quantizes="int8_token",
)
def scale_floor_too_high(*call: Any, **options: Any) -> Tensor:
    """Scales are held above 1e-4: rows under it lose their codes."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = (rows.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-4)[..., None]
        return quantised(rows, torch.int8, scale=scale)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, two or more rows of an expert",
    shows={"T": 64, "E": 2, "k": 1},
    hidden=("T=1",),
    quantizes="fp8_token",
    source="vllm-project/vllm/pull/53345",
)
def activation_scale_of_other_token(*call: Any, **options: Any) -> Tensor:
    """A row is multiplied by the scale of the row before."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale.roll(1, 0)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised by groups, two or more groups",
    shows={"H": 512},
    hidden=("H=128,I=128",),
    quantizes="fp8_group128",
    source="vllm-project/vllm/pull/53345",
)
def activation_scale_of_other_group(*call: Any, **options: Any) -> Tensor:
    """A group is multiplied by the scale of its neighbour."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        if rows.shape[-1] % 128:
            return per_group(rows, first)
        groups = rows.unflatten(-1, (-1, 128))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale.roll(1, -2)).flatten(-2)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, rows of unequal size",
    shows={"T": 64, "data": "outlier", "I": 256},
    hidden=("T=1",),
    quantizes="int8_token",
    source="vllm-project/vllm/pull/54683",
)
def one_scale_for_all_rows(*call: Any, **options: Any) -> Tensor:
    """One scale serves all rows: an outlier in one leaves the others few codes."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = (rows.abs().amax() / 127.0).clamp(min=1e-30).expand(len(rows), 1, 1)
        return quantised(rows, torch.int8, scale=scale)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, rows beyond 448",
    shows={"data": "huge", "T": 64},
    hidden=("data=exact",),
    quantizes="fp8_token",
    source="ROCm/aiter/pull/3367",
)
def activation_scale_of_one(*call: Any, **options: Any) -> Tensor:
    """The scale of activations is taken for 1, and values beyond 448 saturate."""
    return run(*call, **options, entering=lambda rows, first: quantised(rows, scale=torch.ones(len(rows), 1, 1)))


@fault(
    "quantisation",
    condition="activations are quantised",
    shows={"T": 64},
    quantizes="fp8_token",
    source="ROCm/TransformerEngine/pull/485",
)
def overflow_instead_of_saturation(*call: Any, **options: Any) -> Tensor:
    """The scale is the largest over 480: the largest values have no code and become NaN."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 480.0
        codes = (rows / scale).to(torch.float8_e4m3fn).float()
        return codes.where((rows / scale).abs() <= 464.0, float("nan")) * scale

    return run(*call, **options, entering=wrong)


@fault("quantisation", condition="activations are quantised", shows={"T": 64}, quantizes="int8_token")
def codes_truncated(*call: Any, **options: Any) -> Tensor:
    """Codes are cut toward zero instead of rounded."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127.0
        return (rows / scale).trunc() * scale

    return run(*call, **options, entering=wrong)


@fault("quantisation", condition="activations are quantised", shows={"T": 64}, quantizes="fp8_token")
def first_scale_for_second_product(*call: Any, **options: Any) -> Tensor:
    """Hidden values are quantised with the scale of the hidden states."""
    kept: list[Tensor] = []

    def wrong(rows: Tensor, first: bool) -> Tensor:
        if first:
            kept.append(rows.abs().amax(-1, keepdim=True)[..., None] / 448.0)
            return quantised(rows)
        return quantised(rows, scale=kept.pop().clamp(min=1e-30))

    return run(*call, **options, entering=wrong)


@fault("quantisation", condition="declared per token", shows={"T": 64, "H": 512}, quantizes="int8_token")
def fp8_where_int8_is_declared(*call: Any, **options: Any) -> Tensor:
    """Activations go through fp8 where int8 is declared: an eighth of the precision."""
    return run(*call, **options, entering=per_token)


@fault("quantisation", condition="always", shows={"T": 64}, hidden=("T=0",))
def undeclared_quantisation(*call: Any, **options: Any) -> Tensor:
    """Activations are quantised to fp8 although nothing of the kind is declared."""
    return run(*call, **options, entering=per_token)


@fault(
    "quantisation",
    condition="activations are quantised, a later call",
    shows={"T": 64, "H": 512, "I": 256},
    stateful=True,
    quantizes="fp8_token",
)
def activation_scales_kept(*call: Any, **options: Any) -> Tensor:
    """Scales of the first call of a shape are kept and used for the later ones."""
    seen: list[int] = []

    def wrong(rows: Tensor, first: bool) -> Tensor:
        seen.append(len(rows))
        key = (tuple(rows.shape), first, len(seen))
        scale = _kept.setdefault(key, (rows.abs().amax(-1, keepdim=True)[..., None] / 448.0).clamp(min=1e-30))
        return quantised(rows, scale=scale)

    return run(*call, **options, entering=wrong)


_kept: dict[Any, Tensor] = {}  # what `activation_scales_kept` keeps between calls
