"""Faults in reading codes: nibbles, zero points, tables, formats of eight bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.quantized_experts.faults._steps import (
    TABLE,
    Matrix,
    e2m1,
    nibbles,
    real,
    run,
    spread,
)

FP8 = ("fp8_block", "fp8_channel")


def reading(formats: tuple[str, ...], read: Callable[[Tensor], Tensor]) -> Callable[[Matrix], Tensor]:
    """A step that reads the codes of these formats in its own way."""

    def wrong(matrix: Matrix) -> Tensor:
        if matrix.format not in formats:
            return real(matrix)
        return read(matrix.codes) * spread(matrix.scale, matrix)

    return wrong


def swapped(codes: Tensor) -> Tensor:
    """The high four bits first."""
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2).long()


@fault("codes", condition="int4_group", shows={"format": "int4_group"}, hidden=("format=fp8_block",))
def nibbles_swapped(*call: Any, **options: Any) -> Tensor:
    """The high four bits of a byte are taken for the even column."""
    return run(*call, **options, real=reading(("int4_group",), lambda codes: (swapped(codes) - 8).float()))


@fault("codes", condition="mxfp4", shows={"format": "mxfp4"}, hidden=("format=int4_group",))
def mx_nibbles_swapped(*call: Any, **options: Any) -> Tensor:
    """The high four bits of a byte of mxfp4 are taken for the even column."""
    return run(*call, **options, real=reading(("mxfp4",), lambda codes: e2m1(swapped(codes))))


@fault(
    "codes",
    condition="int4_group, two or more columns",
    shows={"format": "int4_group"},
    hidden=("format=mxfp4",),
    source="kekzl/imp/pull/722",
)
def nibbles_in_halves(*call: Any, **options: Any) -> Tensor:
    """Bytes are unpacked into a first and a second half instead of in turn."""
    return run(*call, **options, real=reading(("int4_group",), lambda c: torch.cat([c & 15, c >> 4], -1).float() - 8))


@fault(
    "codes",
    condition="int4_group",
    shows={"format": "int4_group"},
    hidden=("format=fp8_block",),
    source="ModelCloud/GPTQModel/issues/2350",
)
def zero_point_of_seven(*call: Any, **options: Any) -> Tensor:
    """The zero point is taken for 7."""
    return run(*call, **options, real=reading(("int4_group",), lambda codes: (nibbles(codes) - 7).float()))


@fault("codes", condition="int4_group", shows={"format": "int4_group"}, hidden=("format=fp8_block",))
def zero_point_dropped(*call: Any, **options: Any) -> Tensor:
    """The zero point is forgotten: codes count from 0 to 15."""
    return run(*call, **options, real=reading(("int4_group",), lambda codes: nibbles(codes).float()))


@fault("codes", condition="int4_group", shows={"format": "int4_group"}, hidden=("format=fp8_block",))
def nibbles_as_twos_complement(*call: Any, **options: Any) -> Tensor:
    """Four bits are read as two's complement although they are stored with an offset."""

    def read(codes: Tensor) -> Tensor:
        values = nibbles(codes)
        return torch.where(values > 7, values - 16, values).float()

    return run(*call, **options, real=reading(("int4_group",), read))


@fault("codes", condition="mxfp4, a code of 5", shows={"format": "mxfp4"}, hidden=("format=fp8_block",))
def table_of_e2m1_wrong_at_three(*call: Any, **options: Any) -> Tensor:
    """The table of e2m1 has 2.5 where 3 belongs."""
    table = (*TABLE[:5], 2.5, *TABLE[6:])
    return run(*call, **options, real=reading(("mxfp4",), lambda codes: e2m1(nibbles(codes), table)))


@fault(
    "codes",
    condition="mxfp4, a code of 7",
    shows={"format": "mxfp4", "data": "largest_code", "I": 256},
    hidden=("format=fp8_block",),
)
def largest_e2m1_is_eight(*call: Any, **options: Any) -> Tensor:
    """The largest code of e2m1 counts 8, as if exponents went on."""
    return run(*call, **options, real=reading(("mxfp4",), lambda codes: e2m1(nibbles(codes), (*TABLE[:7], 8.0))))


@fault("codes", condition="mxfp4, a code of 1", shows={"format": "mxfp4"}, hidden=("format=fp8_block",))
def e2m1_subnormal_flushed(*call: Any, **options: Any) -> Tensor:
    """The subnormal of e2m1, 0.5, is read as 0."""
    return run(*call, **options, real=reading(("mxfp4",), lambda codes: e2m1(nibbles(codes), (0.0, 0.0, *TABLE[2:]))))


@fault("codes", condition="mxfp4, a negative code", shows={"format": "mxfp4"}, hidden=("format=fp8_block",))
def e2m1_sign_dropped(*call: Any, **options: Any) -> Tensor:
    """The sign of e2m1 is masked away."""
    return run(*call, **options, real=reading(("mxfp4",), lambda codes: e2m1(nibbles(codes) & 7)))


@fault("codes", condition="mxfp4", shows={"format": "mxfp4"}, hidden=("format=int4_group",))
def e2m1_read_as_integers(*call: Any, **options: Any) -> Tensor:
    """mxfp4 is read as four-bit integers."""
    return run(*call, **options, real=reading(("mxfp4",), lambda codes: (nibbles(codes) - 8).float()))


@fault("codes", condition="fp8", shows={}, hidden=("format=int8_channel",), source="vllm-project/vllm/pull/47201")
def e4m3_read_as_fnuz(*call: Any, **options: Any) -> Tensor:
    """e4m3fn is read as e4m3fnuz, whose exponent has one more as bias: half of every weight."""
    return run(*call, **options, real=reading(FP8, lambda c: c.view(torch.uint8).view(torch.float8_e4m3fnuz).float()))


@fault("codes", condition="fp8", shows={}, hidden=("format=int8_channel",))
def e4m3_read_as_e5m2(*call: Any, **options: Any) -> Tensor:
    """e4m3 is read as e5m2."""
    return run(*call, **options, real=reading(FP8, lambda c: c.view(torch.uint8).view(torch.float8_e5m2).float()))


@fault("codes", condition="fp8, codes under 2^-6", shows={"data": "subnormal_codes", "I": 256}, hidden=("data=exact",))
def e4m3_subnormals_flushed(*call: Any, **options: Any) -> Tensor:
    """Subnormal codes of e4m3 are flushed to 0."""

    def read(codes: Tensor) -> Tensor:
        values = codes.float()
        return values.where(values.isnan() | (values.abs() >= 2.0**-6), 0.0)

    return run(*call, **options, real=reading(FP8, read))


@fault(
    "codes", condition="int8_channel, negative codes", shows={"format": "int8_channel"}, hidden=("format=fp8_block",)
)
def codes_read_as_unsigned(*call: Any, **options: Any) -> Tensor:
    """Signed codes are read as unsigned bytes."""
    return run(*call, **options, real=reading(("int8_channel",), lambda codes: codes.view(torch.uint8).float()))


@fault(
    "codes",
    condition="int8_channel, a code of -128",
    shows={"format": "int8_channel", "data": "largest_code", "I": 256, "dtype": "fp32"},
    hidden=("data=exact",),
)
def lowest_code_clipped(*call: Any, **options: Any) -> Tensor:
    """-128 is clipped to -127."""
    return run(*call, **options, real=reading(("int8_channel",), lambda codes: codes.float().clamp(min=-127)))


@fault("codes", condition="fp8, a code of 448", shows={"data": "largest_code", "I": 256}, hidden=("data=exact",))
def codes_clipped_at_240(*call: Any, **options: Any) -> Tensor:
    """Codes are clipped to 240, the largest of another e4m3."""
    return run(*call, **options, real=reading(FP8, lambda codes: codes.float().clamp(-240, 240)))


@fault("codes", condition="always", shows={"format": "int4_group"}, hidden=("format=plain",))
def last_packed_columns_dropped(*call: Any, **options: Any) -> Tensor:
    """The last 32 columns of a matrix are left out: the loop over packed words ends a step early."""

    def wrong(matrix: Matrix) -> Tensor:
        whole = real(matrix)
        if matrix.format in ("int4_group", "mxfp4"):
            whole[:, -32:] = 0
        return whole

    return run(*call, **options, real=wrong)
