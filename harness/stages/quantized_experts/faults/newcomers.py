"""Mistakes of first kernels over codes: units of groups, arithmetic of bytes, halves, weights of slots, ids of -1.

Each was written as a newcomer would and judged by the command: of 21 such kernels 18 failed without a cause, and of two
another one was told.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.quantized_experts.faults._steps import (
    RIGHT,
    Matrix,
    Steps,
    arguments,
    e2m1,
    halves,
    nibbles,
    numbers,
    real,
    run,
    spread,
)

INT4: dict[str, Any] = {"format": "int4_group"}
MX: dict[str, Any] = {"format": "mxfp4"}
OF_INT4, OF_MX = ("format=mxfp4",), ("format=int4_group",)


def of(format: str, value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Matrix], Tensor]:
    """A step in which matrices of one format have the value that is made of their codes and their scales, [N, K]."""

    def wrong(matrix: Matrix) -> Tensor:
        return value(matrix.codes, spread(matrix.scale, matrix)) if matrix.format == format else real(matrix)

    return wrong


# Scales ---------------------------------------------------------------------------------------------------------


@fault("scales", condition="fp8_block, a block that is cut", shows={"H": 200, "I": 72}, hidden=("H=256,I=128",))
def blocks_sized_by_their_count(*call: Any, **options: Any) -> Tensor:
    """The size of a block is taken to be the matrix's over the number of blocks, so that cut blocks shrink all."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.format != "fp8_block" or matrix.scale is None:
            return real(matrix)
        (rows, columns), (down, across) = matrix.codes.shape, matrix.scale.shape
        whole = matrix.scale.repeat_interleave(-(-rows // down), 0)[:rows]
        return numbers(matrix) * whole.repeat_interleave(-(-columns // across), 1)[:, :columns]

    return run(*call, **options, real=wrong)


@fault("scales", condition="fp8_block, a block that is cut", shows={"H": 200, "I": 72}, hidden=("H=256,I=128",))
def cut_blocks_left_out(*call: Any, **options: Any) -> Tensor:
    """Only whole blocks are dequantised: rows and columns behind the last one count as 0."""

    def wrong(matrix: Matrix) -> Tensor:
        value = real(matrix)
        if matrix.format == "fp8_block":
            rows, columns = value.shape
            value[rows - rows % 128 :], value[:, columns - columns % 128 :] = 0, 0
        return value

    return run(*call, **options, real=wrong)


@fault("scales", condition="two or more blocks of columns", shows={}, hidden=("format=fp8_channel",))
def scale_of_first_column_block(*call: Any, **options: Any) -> Tensor:
    """A row has one scale, that of its first block of columns: the index over K is missing."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.scale is None or matrix.scale.dim() < 2:
            return real(matrix)
        return numbers(matrix) * spread(matrix.scale[:, :1].expand_as(matrix.scale), matrix)

    return run(*call, **options, real=wrong)


@fault("scales", condition="gate and up have scales of their own", shows={}, hidden=("format=plain",))
def up_scaled_as_gate(*call: Any, **options: Any) -> Tensor:
    """Rows of up are scaled as those of gate: the row within a half finds the scale, for both halves."""

    def wrong(matrix: Matrix) -> Tensor:
        if not matrix.first or matrix.scale is None:
            return real(matrix)
        gate, _ = spread(matrix.scale, matrix).chunk(2)
        return numbers(matrix) * gate.repeat(2, 1)

    return run(*call, **options, real=wrong)


@fault("scales", condition="a second group of columns, int4_group or mxfp4", shows=INT4, hidden=("format=fp8_block",))
def groups_counted_in_bytes(*call: Any, **options: Any) -> Tensor:
    """The group of a column is found by its byte, of which each holds two: a scale reaches twice too far."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.format not in ("int4_group", "mxfp4"):
            return real(matrix)
        return numbers(matrix) * spread(matrix.scale, matrix, block=256, group=64)

    return run(*call, **options, real=wrong)


@fault("scales", condition="mxfp4", shows=MX, hidden=OF_MX, variants={"over": (1.0, 127.0)})
def exponents_taken_for_factors(*call: Any, over: float = 1.0, **options: Any) -> Tensor:
    """The bytes of mxfp4's scales multiply as the numbers they are, where they are exponents of 2."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.format != "mxfp4" or matrix.scale is None:
            return real(matrix)
        return numbers(matrix) * (matrix.scale.float() / over).repeat_interleave(32, -1)

    return run(*call, **options, real=wrong)


# Codes ----------------------------------------------------------------------------------------------------------


@fault("codes", condition="fp8", shows={}, hidden=("format=int8_channel",))
def e4m3_bits_taken_for_integers(*call: Any, **options: Any) -> Tensor:
    """The bytes of e4m3 are read as signed integers."""
    wrong = of("fp8_block", lambda codes, scale: codes.view(torch.int8).float() * scale)
    return run(*call, **options, real=wrong)


@fault("codes", condition="int4_group, a code under 8", shows=INT4, hidden=OF_INT4)
def zero_point_wraps(*call: Any, **options: Any) -> Tensor:
    """8 is subtracted while codes are still unsigned bytes: what is negative becomes 248 to 255."""
    wrong = of("int4_group", lambda codes, scale: (nibbles(codes) - 8).remainder(256).float() * scale)
    return run(*call, **options, real=wrong)


@fault("codes", condition="int4_group, a high code over 7", shows=INT4, hidden=OF_INT4)
def high_nibble_sign_extended(*call: Any, **options: Any) -> Tensor:
    """Packed codes are signed bytes where they are shifted: a high code of 8 or more is 16 too small."""

    def wrong(codes: Tensor, scale: Tensor) -> Tensor:
        high = (codes >> 4).long()
        pair = torch.stack([(codes & 15).long(), torch.where(high > 7, high - 16, high)], -1)
        return (pair.flatten(-2) - 8).float() * scale

    return run(*call, **options, real=of("int4_group", wrong))


@fault("codes", condition="int4_group", shows=INT4, hidden=OF_INT4)
def zero_point_not_scaled(*call: Any, **options: Any) -> Tensor:
    """8 is subtracted from what has been scaled already."""
    return run(*call, **options, real=of("int4_group", lambda codes, scale: nibbles(codes).float() * scale - 8))


@fault("codes", condition="mxfp4, two or more columns", shows=MX, hidden=OF_MX)
def mx_nibbles_in_halves(*call: Any, **options: Any) -> Tensor:
    """Bytes of mxfp4 are unpacked into a first and a second half instead of in turn."""
    wrong = of("mxfp4", lambda codes, scale: e2m1(torch.cat([codes & 15, codes >> 4], -1).long()) * scale)
    return run(*call, **options, real=wrong)


@fault("codes", condition="mxfp4, a code over 1", shows=MX, hidden=OF_MX)
def e2m1_magnitude_taken_for_integer(*call: Any, **options: Any) -> Tensor:
    """Codes of e2m1 are read as a sign and an integer of three bits."""
    table = tuple(map(float, range(8)))
    return run(*call, **options, real=of("mxfp4", lambda codes, scale: e2m1(nibbles(codes), table) * scale))


# What a layer of experts has whatever its weights are -------------------------------------------------------------


@fault("activation", shows={}, hidden=("T=0",))
def gate_taken_for_up(*call: Any, **options: Any) -> Tensor:
    """The halves of the first product are read as [up; gate]."""
    return run(*call, **options, split=lambda rows: halves(rows)[::-1])


@fault(
    "activation", condition="swiglu_oai", shows={"activation": "swiglu_oai"}, hidden=("activation=silu",)
)  # fmt: skip
def oai_gate_taken_for_up(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """In the clamped activation alone the halves are read as [up; gate]."""

    def wrong(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return steps.glu(up, gate, activation) if activation == "swiglu_oai" else steps.glu(gate, up, activation)

    return run(*call, **options, steps=steps, glu=wrong)


@fault("activation", condition="gelu_tanh", shows={"activation": "gelu_tanh"}, hidden=("activation=silu",))
def silu_in_place_of_gelu(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """silu is applied where the call asks for gelu_tanh."""

    def wrong(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return F.silu(gate) * up if activation == "gelu_tanh" else steps.glu(gate, up, activation)

    return run(*call, **options, steps=steps, glu=wrong)


@fault("slots", shows={}, hidden=("T=0",))
def slots_unweighted(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Outputs of the experts are added as they are, without their routing weights."""
    return run(*call, **options, steps=steps, combine=lambda s, w, ids: steps.combine(s, torch.ones_like(w), ids))


@fault("slots", condition="k > 1", shows={}, hidden=("k=1",))
def first_weight_for_every_slot(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Every slot of a token has the routing weight of its first one."""
    return run(*call, **options, steps=steps, combine=lambda s, w, ids: steps.combine(s, w[:, :1].expand_as(w), ids))


@fault("slots", condition="a slot of -1", shows={"masked": "some", "T": 19, "k": 3}, hidden=("masked=none",))
def masked_slots_run_the_last_expert(*call: Any, **options: Any) -> Tensor:
    """-1 counts from the end: what belongs to nobody, or elsewhere, goes through the last expert."""
    experts = len(arguments(call, options)["gate_up_proj"])

    def locate(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return (ids.long() if expert_map is None else expert_map.long()[ids.long()]) % experts

    return run(*call, **options, locate=locate)


@fault("slots", condition="a map that is not the identity", shows={"map": "block", "E": 8}, hidden=("map=none",))
def map_of_experts_ignored(*call: Any, **options: Any) -> Tensor:
    """Ids are taken for local ones although there is a map; those beyond the experts held are left out."""
    return run(*call, **options, locate=lambda ids, expert_map: ids.long().clamp(max=len(call[1])).where(
        ids < len(call[1]), -1))  # fmt: skip
