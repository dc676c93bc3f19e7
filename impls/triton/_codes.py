r"""Tiles of codes: what the codes of a weight stand for, and rows of activations as codes.

A product with a tile of codes is exact in its codes (all of them fit into 16-bit floats and into fp8's own products);
the scale of a run of columns multiplies the sum over that run in fp32, so no weight is rounded.  For mxfp4, whose runs
are 32 columns, powers of two go into the tile where the dtype has their range (bf16, fp32).

Two codes in a byte are not woven into one row: the low ones meet the even columns of the activations, the high ones
the odd columns, in two products.  The weights stay in the registers they were read into.
"""

import triton
import triton.language as tl

from moe_harness.impls.triton._common import after_previous, let_next_start

LARGEST: tl.constexpr = tl.constexpr(448.0)  # of e4m3
RUN: tl.constexpr = tl.constexpr(128)  # columns of activations under one scale


@triton.jit
def whole(code, ZERO: tl.constexpr):
    """code - ZERO in fp32 for a code of at most 23 bits: set as the mantissa of 2^23, four times as fast as a cast."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def doubled_e2m1(code):
    """Twice the value of four bits s eem: as the top of an fp32 they are that number over 2^127."""
    code = code.to(tl.int32)
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 1.7014118346046923e38


@triton.jit
def half_power(exponent):
    """2^(exponent - 128) in fp32 for the bits of an e8m0; the two lowest are subnormal numbers."""
    s = exponent.to(tl.int32)
    return tl.where(s >= 2, (s - 1) << 23, 0x00200000 << s).to(tl.float32, bitcast=True)


@triton.jit
def wide(code, WIDEN: tl.constexpr):
    """fp8 codes as the interpreter multiplies them, in fp32: it takes the code of NaN for 480."""
    if WIDEN:
        value = code.to(tl.float32)
        code = tl.where(tl.abs(value) > LARGEST, float("nan"), value)
    return code


@triton.jit
def as_float(code, FORMAT: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr):
    """A tile of codes as numbers of dtype TO (under the interpreter fp32), exact; those of mxfp4 are doubled."""
    if FORMAT == "int4_group":
        value = whole(code, 8)
    elif FORMAT == "mxfp4":
        value = doubled_e2m1(code)
    elif FORMAT == "int8_channel":
        value = whole(code.to(tl.int32) + 128, 128)
    elif FORMAT == "plain":
        value = code
    else:
        value = wide(code, WIDEN)
        if tl.bfloat16 == TO and not WIDEN:  # from fp16 a cast is an instruction of a slow unit for each code
            value = value.to(tl.float32)
    return value if WIDEN else value.to(TO)


@triton.jit
def nearest_code(x, WIDEN: tl.constexpr):
    """x in fp32 as e4m3, to nearest even, saturating at 448; the interpreter gets it rounded by hand, in fp32.

    Its conversion loses the carry into the next binade: 126.9 becomes 64.
    """
    if WIDEN:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # multiples of 2^-9
        near = tl.where(tl.abs(x) < 0.015625, small, rounded)
        near = tl.where(near > LARGEST, LARGEST, tl.where(near < -LARGEST, -LARGEST, near))
        code = tl.where(x == x, near, x)
    else:
        code = x.to(tl.float8e4nv)
    return code


@triton.jit
def reciprocal(scale):
    """Two factors that together are 1 / scale (1 for a scale of 0): that of a scale under 2^-127 alone overflows.

    A division for every number was a third of the instructions of a product of few rows.
    """
    lift = tl.where(scale < 1e-30, 1.8446744073709552e19, 1.0)
    return lift, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale * lift))


@triton.jit
def quantised(x, AXIS: tl.constexpr, WIDEN: tl.constexpr):
    """Codes of x and the scale of each run along AXIS: the largest |x| of it over 448, and 0 for a run of zeros.

    The largest of a run with a NaN is that of its numbers; the NaN stays a code.
    """
    x = x.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.where(x == x, tl.abs(x), 0.0), AXIS), LARGEST)
    lift, inverse = reciprocal(scale)
    lifted = x * tl.broadcast_to(tl.expand_dims(lift, AXIS), x.shape)
    return nearest_code(lifted * tl.broadcast_to(tl.expand_dims(inverse, AXIS), x.shape), WIDEN), scale


@triton.jit
def as_stored(code, TO: tl.constexpr, WIDEN: tl.constexpr):
    """`nearest_code`s in the dtype TO of memory, fp8; the interpreter has no code for NaN."""
    stored = code.to(TO)
    if WIDEN:
        bits = tl.where(code == code, stored.to(tl.uint8, bitcast=True), 0x7F)
        stored = bits.to(tl.uint8).to(TO, bitcast=True)
    return stored


@triton.jit
def _quantise(
    x, codes, scales, K, groups, x_row, x_col, c_row, s_row, GROUPS: tl.constexpr, RUN: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of x, GROUPS runs of it, as codes and scales.

    Behind the alignment, which writes nothing that is read here: it waits for that at its end, so that whoever waits
    for this waits for both.
    """
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * RUN + tl.arange(0, RUN)[None, :]
    code, scale = quantised(tl.load(x + row * x_row + k.to(tl.int64) * x_col, mask=k < K, other=0.0), 1, WIDEN)
    tl.store(codes + row * c_row + k, as_stored(code, codes.dtype.element_ty, WIDEN), mask=k < K)
    tl.store(scales + row * s_row + group, scale, mask=group < groups)
    after_previous(PDL)


@triton.jit
def row_scales(a_scale, row, live, k0, K, as_row, BK: tl.constexpr, ROWS: tl.constexpr):
    """Scales of rows `row` [BM] at columns k0..k0+BK where they are codes (ROWS "codes"), else 1."""
    if ROWS == "codes":
        by = tl.load(a_scale + row.to(tl.int64) * as_row + k0 // BK, mask=live & (row * 0 + k0 < K), other=0.0)
    else:
        by = tl.full((row.shape[0],), 1.0, tl.float32)
    return by
