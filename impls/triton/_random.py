"""Random numbers that belong to (seed, position, token): the same bits as `impls/torch/sampler.py` has."""

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, position, block, SIZE: tl.constexpr):
    """Standard Gumbel variates, fp32 [4 * SIZE], of tokens 4 * block to 4 * (block + SIZE) - 1.

    Philox4x32-10 (Salmon et al., SC 2011) with the counter (token // 4, position, 0, 0) and the seed as key: one block
    of it serves four neighbours.  v is uniform on 2^32 values and E = -log(1 - v) exponential; the small E, which
    decide draws, are taken from the series of the logarithm, where 1 - v would have lost digits of v.
    """
    counter = (block + tl.arange(0, SIZE)).to(tl.uint32)
    second = tl.zeros([SIZE], tl.uint32) + position.to(tl.uint32)
    zero = tl.zeros([SIZE], tl.uint32)
    a, b, c, d = tl.philox_impl(counter, second, zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * SIZE])
    v = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355225)
    exponential = tl.where(v < 0.00390625, v * (1 + v * (0.5 + v * 0.3333333333333333)), -tl.log(1 - v))
    return -tl.log(exponential)
