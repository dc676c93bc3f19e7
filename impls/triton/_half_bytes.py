"""Codes of four bits as numbers of 16 bits, eight of a word at a time, in the order that costs least.

A word of 32 bits holds the codes of eight columns.  Every fourth bit of it shifted to the lowest place gives two codes
16 bits apart: as they stand, two numbers of 16 bits.  int4 takes 11 instructions a word (the codes set as the lowest
bits of a power of two, from which a fused multiply-add takes the power and 8), e2m1 23 (sign, exponent and mantissa
moved to where bf16 has them, and multiplied up to their place and by their scale).

The columns of a product may stand in any order that both operands agree on.  So that nothing is moved from thread to
thread, and each reads 16 bytes of a row at once, columns are taken in the order in which a tensor core's registers are
filled from such words: the activations are woven to fit (`row_order`), once for all programs (`weave_rows`).  Before,
with even and odd columns in two products, a third of the instructions put pairs of bytes into their places, and
Qwen3-30B-A3B in int4 took 4.1 instructions for each code of its first product, in mxfp4 6.2.
"""

import triton
import triton.language as tl

from moe_harness.impls.triton._codes import as_float
from moe_harness.impls.triton._common import after_previous, let_next_start

_INT4 = """{
.reg .b32 a, b, c, d, one, off;
shr.b32 b, $8, 8;
shr.b32 c, $8, 4;
shr.b32 d, $8, 12;
lop3.b32 a, $8, 0x000f000f, POWER, 0xea;
lop3.b32 b, b, 0x000f000f, POWER, 0xea;
lop3.b32 c, c, 0x000f000f, POWER, 0xea;
lop3.b32 d, d, 0x000f000f, POWER, 0xea;
mov.b32 one, ONE;
mov.b32 off, OFF;
fma.rn.TYPE a, a, one, off;
fma.rn.TYPE b, b, one, off;
fma.rn.TYPE c, c, one, off;
fma.rn.TYPE d, d, one, off;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}"""
_E2M1 = """{
.reg .b32 a, b, c, d, m, n, o, p, big, zero;
shl.b32 a, $8, 12;
shl.b32 b, $8, 4;
shl.b32 c, $8, 8;
shl.b32 m, $8, 6;
shr.b32 n, $8, 2;
shl.b32 o, $8, 2;
shr.b32 p, $8, 6;
and.b32 m, m, 0x01c001c0;
and.b32 n, n, 0x01c001c0;
and.b32 o, o, 0x01c001c0;
and.b32 p, p, 0x01c001c0;
lop3.b32 a, a, 0x80008000, m, 0xea;
lop3.b32 b, b, 0x80008000, n, 0xea;
lop3.b32 c, c, 0x80008000, o, 0xea;
lop3.b32 d, $8, 0x80008000, p, 0xea;
mov.b32 big, 0x7f007f00;
mov.b32 zero, 0x80008000;
fma.rn.bf16x2 a, a, big, zero;
fma.rn.bf16x2 b, b, big, zero;
fma.rn.bf16x2 c, c, big, zero;
fma.rn.bf16x2 d, d, big, zero;
fma.rn.bf16x2 a, a, $9, zero;
fma.rn.bf16x2 b, b, $9, zero;
fma.rn.bf16x2 c, c, $9, zero;
fma.rn.bf16x2 d, d, $9, zero;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}"""
_EIGHT = ",".join(["=h"] * 8)


def _int4(kind: str, power: str, one: str, off: str) -> tl.constexpr:
    text = _INT4.replace("TYPE", kind).replace("POWER", power)
    return tl.constexpr(text.replace("ONE", one).replace("OFF", off))


# 128 + code - 136 in bf16, 1024 + code - 1032 in fp16.
INT4_BF16: tl.constexpr = _int4("bf16x2", "0x43004300", "0x3f803f80", "0xc308c308")
INT4_FP16: tl.constexpr = _int4("f16x2", "0x64006400", "0x3c003c00", "0xe408e408")
E2M1: tl.constexpr = tl.constexpr(_E2M1)
OF_WORD: tl.constexpr = tl.constexpr(_EIGHT + ",r")
OF_SCALED: tl.constexpr = tl.constexpr(_EIGHT + ",r,r")


@triton.jit
def word_tile(
    w, e, n0, row, inside, k0, K, w_e, w_n, w_k, BK: tl.constexpr, TMA: tl.constexpr, WORDS: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Words [R, BK / 8] of rows `row` [R] of w[e] at column k0, zero where not `inside`; of bytes, WORDS or not.

    TMA: by a descriptor, the rows from n0 on, or (PAIRED) `pair_tile`'s.
    """
    R: tl.constexpr = row.shape[0]
    if TMA and PAIRED:
        word = tl.reshape(w.load([e, n0 // 8, 0, 0, k0 // 8]), (R, BK // 8))
    elif TMA:
        word = tl.reshape(w.load([e, n0, k0 // 8]), (R, BK // 8))
    else:
        SHARE: tl.constexpr = 8 if WORDS else 2
        k = k0 // SHARE + tl.arange(0, BK // SHARE)
        at = w + e.to(tl.int64) * w_e + row[:, None].to(tl.int64) * w_n + k[None, :].to(tl.int64) * w_k
        word = tl.load(at, mask=inside[:, None] & (k < K // SHARE)[None, :], other=0).to(tl.int32)
        if not WORDS:
            even, odd = tl.split(tl.reshape(word, (R, BK // 8, 2, 2)))
            first, second = tl.split(even | odd << 8)
            word = first | second << 16
    return word


@triton.jit
def _code(word, at: tl.constexpr, FORMAT: tl.constexpr):
    """The code of column `at` of each word, as `as_float` has it."""
    return as_float((word >> 4 * at) & 15, FORMAT, tl.float32, False)


@triton.jit
def _join(a, b, c, d, e, f, g, h):
    """[R, W] eight times as [R, W, 2, 2, 2]."""
    return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))


@triton.jit
def numbers(word, factor, FORMAT: tl.constexpr, SCALED: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr):
    """Words [R, W] as numbers [R, 8 * W] of TO in the order of `row_order`; those of mxfp4 doubled.

    SCALED: times `factor` [R, W], fp32, half the powers of two of the words.
    """
    R: tl.constexpr = word.shape[0]
    W: tl.constexpr = word.shape[1]
    if FORMAT == "int4_group" and tl.bfloat16 == TO and not WIDEN:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(INT4_BF16, OF_WORD, [word], (tl.bfloat16,) * 8, True, 1)
    elif FORMAT == "int4_group" and tl.float16 == TO and not WIDEN:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(INT4_FP16, OF_WORD, [word], (tl.float16,) * 8, True, 1)
    elif SCALED and tl.bfloat16 == TO and not WIDEN:
        twice = (factor.to(tl.int32, bitcast=True) >> 16) * 0x10001
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            E2M1, OF_SCALED, [word, twice], (tl.bfloat16,) * 8, True, 1
        )  # fmt: skip
    else:
        a, b = _code(word, 0, FORMAT), _code(word, 4, FORMAT)
        c, d = _code(word, 2, FORMAT), _code(word, 6, FORMAT)
        e, f = _code(word, 1, FORMAT), _code(word, 5, FORMAT)
        g, h = _code(word, 3, FORMAT), _code(word, 7, FORMAT)
        if SCALED:
            a, b, c, d = a * factor, b * factor, c * factor, d * factor
            e, f, g, h = e * factor, f * factor, g * factor, h * factor
    columns = tl.reshape(_join(a, b, c, d, e, f, g, h), (R, 4, W // 4, 2, 2, 2))  # thread, chunk, odd, half, pair
    return tl.reshape(tl.permute(columns, (0, 3, 2, 4, 1, 5)), (R, 8 * W)).to(TO)


@triton.jit
def row_order(rows):
    """Rows [R, K] of activations in the order of `numbers`: thread, chunk, pair, half, odd are the bits of a column."""
    R: tl.constexpr = rows.shape[0]
    K: tl.constexpr = rows.shape[1]
    columns = tl.reshape(rows, (R, 4, K // 32, 2, 2, 2))
    return tl.reshape(tl.permute(columns, (0, 5, 2, 4, 1, 3)), (R, K))


@triton.jit
def woven_places(n0, BN: tl.constexpr):
    """Where columns n0.. of a `woven_tile` lie."""
    p = tl.arange(0, BN)
    if BN == 128:
        at = n0 + p
    else:  # told what is contiguous, the compiler stores 8 bytes at a time
        at = tl.max_contiguous(tl.multiple_of(n0 // 128 * 128 + n0 % 128 // 16 + p // 4 * 8 + p % 4, 4), 4)
    return at


@triton.jit
def woven_tile(y):
    """y [BN, BM], columns of BM rows (a run of 128 or half of one), in the order in which they lie when woven."""
    BN: tl.constexpr = y.shape[0]
    BM: tl.constexpr = y.shape[1]
    columns = tl.reshape(y, (BN // 32, 4, 2, 2, 2, BM))  # thread, chunk, pair, half, odd
    return tl.reshape(tl.permute(columns, (4, 1, 3, 0, 2, 5)), (BN, BM))


@triton.jit
def weave_rows(x, out, K, x_row, x_col, o_row, GROUPS: tl.constexpr, PDL: tl.constexpr):
    """Row program_id(0) of x, GROUPS runs of 128 columns of it, as `row_order` has them; zeros past the last column.

    Behind the alignment, as `_quantise` is.
    """
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    woven = row_order(tl.load(x + row * x_row + k.to(tl.int64) * x_col, mask=k < K, other=0.0))
    tl.store(out + row * o_row + k, woven, mask=(group * 128 < K)[:, None])
    after_previous(PDL)
