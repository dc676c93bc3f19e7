"""Codes of four bits as numbers of 16 bits, four of a kind from four bytes at a time.

By way of fp32 a code took five instructions and more (int4: mask, or, subtract, half a cast; e2m1 ten), and 64 tokens
of Qwen3-30B-A3B in int4 256 us where the bytes take 73.  In pairs of 16 bits it takes two (int4: the code set as the
lowest bits of a power of two, from which a fused multiply-add takes the power and 8) or four (e2m1: sign, exponent
and mantissa moved to where bf16 has them, and multiplied up to their place).
"""

import triton
import triton.language as tl

from moe_harness.impls.triton._codes import as_float

_INT4 = """{
.reg .b32 t, a, b, one, off;
shr.b32 t, $2, SHIFT;
prmt.b32 a, t, 0, 0x4140;
prmt.b32 b, t, 0, 0x4342;
lop3.b32 a, a, 0x000f000f, POWER, 0xea;
lop3.b32 b, b, 0x000f000f, POWER, 0xea;
mov.b32 one, ONE;
mov.b32 off, OFF;
fma.rn.TYPE $0, a, one, off;
fma.rn.TYPE $1, b, one, off;
}"""
_E2M1 = """{
.reg .b32 t, a, b, m, n, big, zero;
shl.b32 t, $2, SHIFT;
prmt.b32 a, t, 0, 0x1404;
prmt.b32 b, t, 0, 0x3424;
shr.b32 m, a, 6;
shr.b32 n, b, 6;
and.b32 m, m, 0x01c001c0;
and.b32 n, n, 0x01c001c0;
lop3.b32 a, a, 0x80008000, m, 0xea;
lop3.b32 b, b, 0x80008000, n, 0xea;
mov.b32 big, 0x7f007f00;
mov.b32 zero, 0x80008000;
fma.rn.bf16x2 a, a, big, zero;
fma.rn.bf16x2 b, b, big, zero;
fma.rn.bf16x2 $0, a, $3, zero;
fma.rn.bf16x2 $1, b, $4, zero;
}"""


def _int4(kind: str, shift: int, power: str, one: str, off: str) -> tl.constexpr:
    text = _INT4.replace("TYPE", kind).replace("SHIFT", str(shift)).replace("POWER", power)
    return tl.constexpr(text.replace("ONE", one).replace("OFF", off))


# 128 + code - 136 in bf16, 1024 + code - 1032 in fp16.
BF16 = ("0x43004300", "0x3f803f80", "0xc308c308")
FP16 = ("0x64006400", "0x3c003c00", "0xe408e408")
INT4_BF16_LOW: tl.constexpr = _int4("bf16x2", 0, *BF16)
INT4_BF16_HIGH: tl.constexpr = _int4("bf16x2", 4, *BF16)
INT4_FP16_LOW: tl.constexpr = _int4("f16x2", 0, *FP16)
INT4_FP16_HIGH: tl.constexpr = _int4("f16x2", 4, *FP16)
E2M1_LOW: tl.constexpr = tl.constexpr(_E2M1.replace("SHIFT", "4"))
E2M1_HIGH: tl.constexpr = tl.constexpr(_E2M1.replace("SHIFT", "0"))


@triton.jit
def half_bytes(tile, FORMAT: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr):
    """The low and the high codes of a tile of bytes, as `as_float` has them."""
    if FORMAT == "int4_group" and tl.bfloat16 == TO and not WIDEN:
        low = tl.inline_asm_elementwise(INT4_BF16_LOW, "=r,=r,r", [tile], tl.bfloat16, True, 4)
        high = tl.inline_asm_elementwise(INT4_BF16_HIGH, "=r,=r,r", [tile], tl.bfloat16, True, 4)
    elif FORMAT == "int4_group" and tl.float16 == TO and not WIDEN:
        low = tl.inline_asm_elementwise(INT4_FP16_LOW, "=r,=r,r", [tile], tl.float16, True, 4)
        high = tl.inline_asm_elementwise(INT4_FP16_HIGH, "=r,=r,r", [tile], tl.float16, True, 4)
    else:
        low = as_float(tile & 15, FORMAT, tl.float32, WIDEN).to(TO)
        high = as_float(tile >> 4, FORMAT, tl.float32, WIDEN).to(TO)
    return low, high


@triton.jit
def scaled_half_bytes(tile, factors, TO: tl.constexpr, WIDEN: tl.constexpr):
    """The low and the high codes of a tile of mxfp4, each doubled and times its half power of two of `factors`."""
    if tl.bfloat16 == TO and not WIDEN:
        by = factors.to(tl.bfloat16)
        low = tl.inline_asm_elementwise(E2M1_LOW, "=r,=r,r,r,r", [tile, by], tl.bfloat16, True, 4)
        high = tl.inline_asm_elementwise(E2M1_HIGH, "=r,=r,r,r,r", [tile, by], tl.bfloat16, True, 4)
    else:
        low = (as_float(tile & 15, "mxfp4", tl.float32, WIDEN) * factors).to(TO)
        high = (as_float(tile >> 4, "mxfp4", tl.float32, WIDEN) * factors).to(TO)
    return low, high
