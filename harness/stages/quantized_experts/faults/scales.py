"""Faults in the scales of the weights: another block's, another expert's, another arithmetic."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import read_as_contiguous
from moe_harness.harness.stages.quantized_experts.faults._steps import (
    Matrix,
    arguments,
    numbers,
    real,
    run,
    spread,
)


def scaled(matrix: Matrix, scale: Tensor | None, **sizes: int) -> Tensor:
    """The numbers of the matrix under another scale."""
    return numbers(matrix) * spread(scale, matrix, **sizes)


@fault("scales", condition="a matrix of two or more blocks of rows", shows={}, hidden=("format=plain",))
def scale_of_next_row_block(*call: Any, **options: Any) -> Tensor:
    """Each block of rows is scaled with the scale of the next one."""
    return run(*call, **options, real=lambda m: real(m) if m.scale is None else scaled(m, m.scale.roll(-1, 0)))


@fault("scales", condition="two or more blocks of columns", shows={}, hidden=("format=fp8_channel",))
def scale_of_column_block_before(*call: Any, **options: Any) -> Tensor:
    """Each block of columns is scaled with the scale of the one before."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.scale is None or matrix.scale.dim() < 2:
            return real(matrix)
        return scaled(matrix, matrix.scale.roll(1, -1))

    return run(*call, **options, real=wrong)


@fault(
    "scales",
    condition="fp8_block, as many blocks of rows as of columns",
    shows={"H": 256, "I": 128},
    hidden=("format=int8_channel",),
    source="unslothai/unsloth/pull/8953",
)
def block_scales_transposed(*call: Any, **options: Any) -> Tensor:
    """The grid of scales is read transposed, as a kernel that wants them column-major gets it."""

    def wrong(matrix: Matrix) -> Tensor:
        scale = matrix.scale
        if matrix.format != "fp8_block" or scale is None:
            return real(matrix)
        return scaled(matrix, scale.T.reshape(scale.shape))

    return run(*call, **options, real=wrong)


@fault("scales", condition="any scale other than 1", shows={}, hidden=("format=plain",))
def scale_applied_twice(*call: Any, **options: Any) -> Tensor:
    """Weights are dequantised when they are loaded, and scaled again in the kernel."""
    return run(*call, **options, real=lambda m: real(m) * spread(m.scale, m))


@fault("scales", condition="any scale other than 1", shows={}, hidden=("format=plain",))
def down_scale_dropped(*call: Any, **options: Any) -> Tensor:
    """The scales of the second product are never applied: its codes are multiplied as they are."""
    return run(*call, **options, real=lambda m: real(m) if m.first else numbers(m))


@fault("scales", condition="any scale other than 1", shows={}, hidden=("format=plain",))
def scale_divides(*call: Any, **options: Any) -> Tensor:
    """weight_scale_inv is taken by its name: codes are divided by it."""
    return run(*call, **options, real=lambda m: numbers(m) / spread(m.scale, m))


@fault("scales", condition="gate and up have scales of their own", shows={}, hidden=("format=plain",))
def gate_and_up_scales_swapped(*call: Any, **options: Any) -> Tensor:
    """The scales of gate and up are swapped, their codes are not."""

    def wrong(matrix: Matrix) -> Tensor:
        if not matrix.first or matrix.scale is None:
            return real(matrix)
        wide = spread(matrix.scale, matrix)
        return numbers(matrix) * wide.roll(wide.shape[0] // 2, 0)

    return run(*call, **options, real=wrong)


@fault(
    "scales",
    condition="I is no multiple of 128, fp8_block",
    shows={"I": 72, "H": 200},
    hidden=("I=128",),
    source="vllm-project/vllm/pull/48173",
)
def up_blocks_start_anew(*call: Any, **options: Any) -> Tensor:
    """The blocks of up are taken to start anew behind gate: a shard's scales are rounded up by themselves."""

    def wrong(matrix: Matrix) -> Tensor:
        scale = matrix.scale
        if not matrix.first or matrix.format != "fp8_block" or scale is None:
            return real(matrix)
        half = matrix.codes.shape[0] // 2
        n = torch.arange(half, device=scale.device) // 128
        rows = torch.cat([n, -(-half // 128) + n]).clamp(max=scale.shape[0] - 1)
        columns = torch.arange(matrix.codes.shape[1], device=scale.device) // 128
        return numbers(matrix) * scale[rows[:, None], columns]

    return run(*call, **options, real=wrong)


@fault("scales", condition="gate and up have scales of their own", shows={}, hidden=("format=plain",))
def larger_scale_of_gate_and_up(*call: Any, **options: Any) -> Tensor:
    """The fused matrix gets one scale, the larger of gate's and up's, and codes are not made anew."""

    def wrong(matrix: Matrix) -> Tensor:
        if not matrix.first or matrix.scale is None:
            return real(matrix)
        gate, up = spread(matrix.scale, matrix).chunk(2)
        return numbers(matrix) * torch.maximum(gate, up).repeat(2, 1)

    return run(*call, **options, real=wrong)


@fault("scales", condition="two or more experts", shows={}, hidden=("E=1,k=1", "format=plain"))
def scales_of_first_expert(*call: Any, **options: Any) -> Tensor:
    """Every expert is scaled with the scales of the first one."""
    return run(*call, **options, scale_of=lambda expert: 0)


@fault("scales", condition="two or more experts", shows={}, hidden=("format=plain",))
def scales_of_next_expert(*call: Any, **options: Any) -> Tensor:
    """Scales are indexed one expert too far, the last wraps to the first."""
    experts = len(call[1])
    return run(*call, **options, scale_of=lambda expert: (expert + 1) % experts)


@fault("scales", condition="a map that is not the identity", shows={"map": "block", "E": 8}, hidden=("map=none",))
def scales_by_global_id(*call: Any, **options: Any) -> Tensor:
    """Codes are found with the local id, scales with the global one."""
    table = arguments(call, options)["expert_map"]
    if table is None:
        return run(*call, **options)
    globals_of = {int(local): number for number, local in enumerate(table.tolist()) if local >= 0}
    experts = len(call[1])
    return run(*call, **options, scale_of=lambda expert: globals_of[expert] % experts)


@fault(
    "scales", condition="scales with gaps between rows", shows={"layout": "gate_up_scale:padded"}, hidden=("layout=",)
)
def scale_strides_assumed(*call: Any, **options: Any) -> Tensor:
    """Offsets of scales are computed from their shape, whatever their strides are."""
    given = arguments(call, options)
    for name in ("gate_up_scale", "down_scale"):
        if given[name] is not None:
            given[name] = read_as_contiguous(given[name])
    return run(**given)


@fault(
    "scales",
    condition="more than 64 rows or columns, fp8_block or int4_group",
    shows={},
    hidden=("format=fp8_channel",),
)
def blocks_of_64(*call: Any, **options: Any) -> Tensor:
    """Blocks are taken to be 64 wide."""
    return run(*call, **options, real=lambda m: scaled(m, m.scale, block=64))


@fault("scales", condition="more than 16 columns, mxfp4", shows={"format": "mxfp4"}, hidden=("format=fp8_block",))
def mx_blocks_of_16(*call: Any, **options: Any) -> Tensor:
    """mxfp4 is read as nvfp4: a scale for each 16 columns."""
    return run(*call, **options, real=lambda m: scaled(m, m.scale, group=16))


@fault("scales", condition="mxfp4", shows={"format": "mxfp4"}, hidden=("format=fp8_block",))
def exponent_bias_128(*call: Any, **options: Any) -> Tensor:
    """The bias of the exponent is taken for 128: weights are half of what they should be."""
    return run(*call, **options, real=lambda m: real(m) / 2 if m.format == "mxfp4" else real(m))


@fault(
    "scales",
    condition="mxfp4, an exponent over 127",
    shows={"format": "mxfp4", "data": "exact"},
    hidden=("format=fp8_block",),
)
def exponent_read_as_signed(*call: Any, **options: Any) -> Tensor:
    """Exponents are read as signed bytes: 128 and above count as negative."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.format != "mxfp4" or matrix.scale is None:
            return real(matrix)
        exponent = matrix.scale.view(torch.int8).float() - 127
        return numbers(matrix) * exponent.exp2().repeat_interleave(32, -1)

    return run(*call, **options, real=wrong)


@fault(
    "scales",
    condition="scales that bf16 does not hold",
    shows={"format": "fp8_block", "dtype": "fp32"},
    hidden=("data=exact",),
)
def scales_cast_to_bf16(*call: Any, **options: Any) -> Tensor:
    """fp32 scales are cast to bf16 with the rest of the module."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.scale is None or matrix.scale.dtype == torch.uint8:
            return real(matrix)
        return scaled(matrix, matrix.scale.bfloat16())

    return run(*call, **options, real=wrong)


@fault(
    "scales",
    condition="scales that are no powers of two",
    shows={"format": "fp8_block"},
    hidden=("data=exact", "format=mxfp4"),
    source="huggingface/transformers/pull/46763",
)
def scales_rounded_to_powers_of_two(*call: Any, **options: Any) -> Tensor:
    """Scales are rounded up to powers of two for a kernel that wants them so, and codes are not made anew."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.scale is None or matrix.scale.dtype == torch.uint8:
            return real(matrix)
        return scaled(matrix, matrix.scale.float().log2().ceil().exp2())

    return run(*call, **options, real=wrong)


@fault(
    "scales", condition="a last block of columns that is not full", shows={"H": 200, "I": 72}, hidden=("H=256,I=128",)
)
def last_column_block_floored(*call: Any, **options: Any) -> Tensor:
    """The last block of columns is scaled with the one before: K // 128 blocks."""

    def wrong(matrix: Matrix) -> Tensor:
        scale = matrix.scale
        if matrix.format != "fp8_block" or scale is None or scale.shape[1] < 2 or matrix.codes.shape[1] % 128 == 0:
            return real(matrix)
        return scaled(matrix, torch.cat([scale[:, :-1], scale[:, -2:-1]], 1))

    return run(*call, **options, real=wrong)
