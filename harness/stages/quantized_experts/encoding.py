"""Codes and scales: drawn at random, or such that they stand for a given matrix exactly."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core.call import Builder
from moe_harness.reference.quantized_experts import BLOCK, MX_BIAS, MX_BLOCK, over_blocks

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Powers of two by which every entry of an exact matrix (0 to 6 in size) divides into a code.
POWERS = {
    "fp8_block": (0.25, 0.5, 1.0, 2.0), "fp8_channel": (0.25, 0.5, 1.0, 2.0), "int8_channel": (0.25, 0.5, 1.0),
    "int4_group": (0.5, 1.0), "mxfp4": (0.5, 1.0, 2.0),
}  # fmt: skip
# The nearest code of e2m1 by the quarters of a number, rounded up; a search for it takes five times as long.
E2M1_OF_QUARTERS = (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, *4 * (5,), *6 * (6,), 7)
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
        return over_blocks(scale, rows, columns)
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

    def codes(expert: int) -> Tensor:
        return _stored(matrix[expert].float() / over_elements(scale[expert], format, rows, columns), format)

    return _by_expert(codes, experts), _scale_stored(scale, format, draw)


def _by_expert(codes: Callable[[int], Tensor], experts: int) -> Tensor:
    """Codes [E, ...] of one expert at a time: in fp32 those of a released model would take gigabytes."""
    first = codes(0)
    out = first.new_empty(experts, *first.shape)
    out[0] = first
    for expert in range(1, experts):
        out[expert] = codes(expert)
    return out


def _stored(codes: Tensor, format: str) -> Tensor:
    """Numbers of the size of codes as the nearest codes of the format; those of int4 from -8 to 7."""
    if format in ("fp8_block", "fp8_channel"):
        return codes.clamp(-LARGEST, LARGEST).to(FP8)
    if format == "int8_channel":
        return codes.round().clamp(-127, 127).to(torch.int8)
    if format == "int4_group":
        return packed((codes.round().clamp(-8, 7) + 8).to(torch.uint8))
    return packed(_e2m1(codes))


def _scale_stored(scale: Tensor, format: str, draw: Builder) -> Tensor:
    """Scales in the dtype of the format; those of mxfp4 are powers of two."""
    if format == "mxfp4":
        return (scale.log2() + MX_BIAS).to(torch.uint8)
    return scale.to(draw.dtype) if format == "int4_group" else scale


def _e2m1(values: Tensor) -> Tensor:
    """Four-bit codes, uint8, of the nearest e2m1 values, the smaller one in the middle between two."""
    quarters = (values.abs() * 4).ceil().clamp(max=len(E2M1_OF_QUARTERS) - 1).int()
    nearest = torch.tensor(E2M1_OF_QUARTERS, dtype=torch.uint8).index_select(0, quarters.flatten()).view(quarters.shape)
    return nearest | (values < 0).to(torch.uint8) << 3


def drawn(
    experts: int, rows: int, columns: int, format: str, draw: Builder, size: float
) -> tuple[Tensor, Tensor | None]:
    """Random (codes, scale) of matrices whose entries are about `size`, with scales that vary by doublings."""
    shape = (experts, rows, columns)
    if format == "plain":
        return draw.large_normal(*shape, scale=size).to(draw.dtype), None
    normal = draw.large_normal(*shape)
    unit = {"fp8_block": 60.0, "fp8_channel": 60.0, "int8_channel": 40.0, "int4_group": 3.0, "mxfp4": 2.0}[format]
    doublings = (draw.uniform(experts, *scale_shape(format, rows, columns)) - 0.5) * SPREAD

    def codes(expert: int) -> Tensor:
        return _stored(normal[expert].float() * unit, format)

    if format == "mxfp4":
        scale = (torch.tensor(size / unit).log2().round() + doublings.round()).exp2()
    else:
        scale = size / unit * doublings.exp2()
    return _by_expert(codes, experts), _scale_stored(scale, format, draw)
