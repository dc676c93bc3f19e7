"""Random numbers that belong to (seed, position, token): the same bits as `impls/torch/sampler.py` has."""

import triton
import triton.language as tl


@triton.jit
def _log2(x, EXACT: tl.constexpr):
    """log2 of normal fp32 numbers, within 2^-22 of it, or of 1 in (0.5, 2): one instruction instead of twenty."""
    if EXACT:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def gumbel(seed, position, block, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Standard Gumbel variates, fp32 [4 * SIZE], of tokens 4 * block to 4 * (block + SIZE) - 1.

    Philox4x32-10 (Salmon et al., SC 2011) with the counter (token // 4, position, 0, 0) and the seed as key: one block
    of it serves four neighbours.  v is uniform on 2^32 values and E = -log(1 - v) exponential; the small E, which
    decide draws, are taken from the series of the logarithm, where 1 - v would have lost digits of v and the quick
    logarithm digits of itself: E is good to 3e-6, the result to 5e-6.
    """
    counter = (block + tl.arange(0, SIZE)).to(tl.uint32)
    second = tl.zeros([SIZE], tl.uint32) + position.to(tl.uint32)
    zero = tl.zeros([SIZE], tl.uint32)
    a, b, c, d = tl.philox_impl(counter, second, zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * SIZE])
    v = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355225)
    series = 0.25 + v * (0.2 + v * 0.16666666666666667)
    series = v * (1 + v * (0.5 + v * (0.3333333333333333 + v * series)))
    exponential = tl.where(v < 0.0625, series, -0.6931471805599453 * _log2(1 - v, EXACT))
    return -0.6931471805599453 * _log2(exponential, EXACT)
