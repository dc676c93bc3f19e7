"""One kernel for the end of half a layer over ranks: put, wait, sum, add the residual, normalise.

Every rank puts its part of each row into the memory of every peer over NVLink (the protocol of `dispatchers._put`:
flags that carry the number of the call, kept on the device, and two halves of the buffer in turn), then sums the parts
of all ranks in the order of the ranks.  A row is one program's from its put to its norm, so that a program waits for
the same program of its peers alone.
"""

import triton
import triton.language as tl

from moe_harness.impls.dispatchers._put import _address, _raise_flags, _wait_for
from moe_harness.impls.triton._common import narrow

PROGRAMS = 128  # all of them wait at once, so they have to fit on the device together: an H200 has 132 multiprocessors


@triton.jit(do_not_specialize=["rows"])
def sum_norm(
    part, residual, weight, out, total, rows,
    peers, epochs, eps, bound, width, first, half_size,
    ADD: tl.constexpr, NORM: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """total[t] = sum over ranks of part[t] (+ residual[t]) in fp32; out[t] = weight * total[t] / rms of the stored row.

    Rows are [rows, width] without gaps.  A peer with another number of rows makes every row NaN.
    """
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    half = epoch % 2
    base = first + half * half_size
    column = tl.arange(0, BLOCK)
    real = column < width
    for row in range(program, rows, PROGRAMS):
        x = tl.load(part + row * width + column, mask=real)
        for q in tl.static_range(RANKS):
            to = _address(peers, q, base, part.dtype.element_ty)
            tl.store(to + (RANK * bound + row) * width + column, x, mask=real)
    _raise_flags(peers, half, epoch, rows, RANK, RANKS, PROGRAMS)
    agreed = 0.0
    for q in tl.static_range(RANKS):
        seen = _wait_for(peers, half, epoch, q, RANK, RANKS, PROGRAMS)
        agreed = tl.where(seen == rows, agreed, float("nan"))
    own = _address(peers, RANK, base, part.dtype.element_ty)
    for row in range(program, rows, PROGRAMS):
        s = tl.zeros((BLOCK,), tl.float32) + agreed
        for q in tl.static_range(RANKS):
            at = own + (q * bound + row) * width + column
            s += tl.load(at, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32)
        if ADD:
            s += tl.load(residual + row * width + column, mask=real, other=0.0).to(tl.float32)
        kept = narrow(s, total.dtype.element_ty, WIDEN)
        tl.store(total + row * width + column, kept, mask=real)
        if NORM:
            s = tl.where(real, kept.to(tl.float32), 0.0)
            inverse = 1.0 / tl.sqrt_rn(tl.sum(s * s, 0) / width + eps)
            scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
            tl.store(out + row * width + column, narrow(s * inverse * scale, out.dtype.element_ty, WIDEN), mask=real)
    tl.store(epochs + program, epoch)
