"""Codes and scales: drawn at random, or such that they stand for a given matrix exactly."""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Builder
from moe_harness.reference.quantized_experts import BLOCK, E2M1, MX_BIAS, MX_BLOCK

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Powers of two by which every entry of an exact matrix (0 to 6 in size) divides into a code.
POWERS = {
    "fp8_block": (0.25, 0.5, 1.0, 2.0), "fp8_channel": (0.25, 0.5, 1.0, 2.0), "int8_channel": (0.25, 0.5, 1.0),
    "int4_group": (0.5, 1.0), "mxfp4": (0.5, 1.0, 2.0),
}  # fmt: skip
SPREAD = 3  # doublings over which the scales of random weights vary: a neighbour's scale is far off


def scale_shape(format: str, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the scales of one matrix [rows, columns]."""
    if format in ("fp8_channel", "int8_channel"):
        return (rows,)
    if format == "fp8_block":
        return (-(-rows // BLOCK), -(-columns // BLOCK))
    return (rows, columns // (BLOCK if format == "int4_group" else MX_BLOCK))


def over_elements(scale: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """Scales [E, ...] spread to their elements, [E, rows, columns]."""
    if format in ("fp8_channel", "int8_channel"):
        return scale[..., None].expand(*scale.shape, columns)
    if format == "fp8_block":
        spread = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)
        return spread[..., :columns]
    return scale.repeat_interleave(BLOCK if format == "int4_group" else MX_BLOCK, -1)


def packed(codes: Tensor) -> Tensor:
    """uint8 [..., K / 2] of four-bit codes [..., K], even ones in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def exact(matrix: Tensor, format: str, draw: Builder) -> tuple[Tensor, Tensor | None]:
    """(codes, scale) that stand for `matrix` [E, N, K] of small integers; each scale a power of two of its own."""
    if format == "plain":
        return matrix.to(draw.dtype), None
    experts, rows, columns = matrix.shape
    powers = torch.tensor(POWERS[format])
    scale = powers[draw.integers(0, len(powers), (experts, *scale_shape(format, rows, columns))).long()]
    codes = matrix.float() / over_elements(scale, format, rows, columns)
    if format in ("fp8_block", "fp8_channel"):
        return codes.to(FP8), scale
    if format == "int8_channel":
        return codes.round().to(torch.int8), scale
    if format == "int4_group":
        return packed(codes.round().long() + 8), scale.to(draw.dtype)
    return packed(_e2m1(codes)), (scale.log2() + MX_BIAS).to(torch.uint8)


def _e2m1(values: Tensor) -> Tensor:
    """Four-bit codes of the nearest e2m1 values."""
    table = torch.tensor(E2M1)
    nearest = torch.bucketize(values.abs().contiguous(), (table[1:] + table[:-1]) / 2)
    return nearest + 8 * (values < 0).long()


def drawn(
    experts: int, rows: int, columns: int, format: str, draw: Builder, size: float
) -> tuple[Tensor, Tensor | None]:
    """Random (codes, scale) of matrices whose entries are about `size`, with scales that vary by doublings."""
    shape = (experts, rows, columns)
    if format == "plain":
        return draw.large_normal(*shape, scale=size).to(draw.dtype), None
    normal = draw.large_normal(*shape).float()
    doublings = (draw.uniform(experts, *scale_shape(format, rows, columns)) - 0.5) * SPREAD
    if format in ("fp8_block", "fp8_channel"):
        return (normal * 60).clamp(-LARGEST, LARGEST).to(FP8), size / 60 * doublings.exp2()
    if format == "int8_channel":
        return (normal * 40).round().clamp(-127, 127).to(torch.int8), size / 40 * doublings.exp2()
    if format == "int4_group":
        codes = (normal * 3).round().clamp(-8, 7).long() + 8
        return packed(codes), (size / 3 * doublings.exp2()).to(draw.dtype)
    exponent = MX_BIAS + torch.tensor(size / 2).log2().round() + doublings.round()
    return packed(_e2m1(normal * 2)), exponent.to(torch.uint8)
