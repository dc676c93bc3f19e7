"""The end of half a layer over ranks in one launch: put, wait, sum, add the residual, normalise.

Every rank puts its part of each row into the memory of every peer over NVLink, then sums the parts of all ranks in the
order of the ranks.  A row is one program's from its put to its norm, so that a program waits for the same program of
its peers alone.  The number of a call is kept on the device, and two halves of the buffer are used in turn.

`sum_norm` puts rows as they are and raises a flag behind them (the protocol of `dispatchers._put`): the flag waits
until the rows have arrived.  `sum_norm_in_words` puts words of 8 bytes, 4 bytes of a row and the number of the call:
nothing is waited for, and who reads looks at the words themselves until all are of this call.  That is twice the bytes,
for rows so few that their way counts and not their number.  Each has a part of the halves of its own, since what one
writes may look like a number to the other.

Its part is a row, or is made on the way of what the kernel before left to do: SLOTS experts' rows with their weights,
or PIECES of a product over its depth.  It is rounded to the dtype of the buffer then, as that kernel would have.
"""

import triton
import triton.language as tl

from moe_harness.impls.dispatchers._put import _address, _raise_flags, _wait_for
from moe_harness.impls.triton._common import after_previous, let_next_start, narrow
from moe_harness.impls.triton.alignment import local_expert

PROGRAMS = 128  # all of them wait at once, so they have to fit on the device together: an H200 has 132 multiprocessors


@triton.jit
def _own(
    part, weights, ids, local, row, column, real, rows, width, experts, known,
    SLOTS: tl.constexpr, PIECES: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """This rank's part of a row: fp32 where it is a sum, as it lies there otherwise."""
    if SLOTS:
        own = column.to(tl.float32) * 0.0
        for j in tl.static_range(SLOTS):
            slot = row * SLOTS + j
            e = local_expert(ids, local, slot, slot < rows * SLOTS, SLOTS, SLOTS, 1, known, experts, HAS_MAP)
            here = e >= 0
            weight = tl.load(weights + slot, mask=here, other=0.0).to(tl.float32)
            lane = column < tl.where(here, width, 0)
            own += weight * tl.load(part + slot.to(tl.int64) * width + column, mask=lane, other=0.0).to(tl.float32)
    else:
        own = tl.load(part + row * width + column, mask=real, other=0.0)
        for piece in tl.static_range(1, PIECES):
            own += tl.load(part + (piece * rows + row) * width + column, mask=real, other=0.0)
    return own


@triton.jit(do_not_specialize=["rows"])
def sum_norm(
    part, weights, ids, local, residual, weight, out, total, rows,
    peers, epochs, eps, bound, width, first, half_size, experts, known,
    ADD: tl.constexpr, NORM: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, PIECES: tl.constexpr, HAS_MAP: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """total[t] = sum over ranks of part[t] (+ residual[t]) in fp32; out[t] = weight * total[t] / rms of the stored row.

    Rows are [rows, width] without gaps, of experts [rows * SLOTS, width], of pieces [PIECES, rows, width].  A peer with
    another number of rows makes every row NaN.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    real = column < width
    kind = total.dtype.element_ty
    if NORM:
        scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    after_previous(PDL)
    let_next_start(PDL)
    epoch = tl.load(epochs + program) + 1
    half = epoch % 2
    base = first + half * half_size
    for row in range(program, rows, PROGRAMS):
        x = _own(part, weights, ids, local, row, column, real, rows, width, experts, known, SLOTS, PIECES, HAS_MAP)
        if SLOTS or part.dtype.element_ty != kind:  # a sum in fp32, of one piece too
            x = narrow(x, kind, WIDEN)
        for q in tl.static_range(RANKS):
            to = _address(peers, q, base, kind)
            tl.store(to + (RANK * bound + row) * width + column, x, mask=real)
    _raise_flags(peers, half, epoch, rows, RANK, RANKS, PROGRAMS)
    if ADD:  # that of the first row, on its way while the flags are
        there = real & (column * 0 + program < rows)
        added = tl.load(residual + program * width + column, mask=there, other=0.0).to(tl.float32)
    agreed = 0.0
    for q in tl.static_range(RANKS):
        seen = _wait_for(peers, half, epoch, q, RANK, RANKS, PROGRAMS)
        agreed = tl.where(seen == rows, agreed, float("nan"))
    own = _address(peers, RANK, base, kind)
    for row in range(program, rows, PROGRAMS):
        s = tl.zeros((BLOCK,), tl.float32) + agreed
        for q in tl.static_range(RANKS):
            at = own + (q * bound + row) * width + column
            s += tl.load(at, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32)
        if ADD:
            s += added
            more = row + PROGRAMS
            there = real & (column * 0 + more < rows)
            added = tl.load(residual + more * width + column, mask=there, other=0.0).to(tl.float32)
        kept = narrow(s, kind, WIDEN)
        tl.store(total + row * width + column, kept, mask=real)
        if NORM:
            s = tl.where(real, kept.to(tl.float32), 0.0)
            inverse = 1.0 / tl.sqrt_rn(tl.sum(s * s, 0) / width + eps)
            tl.store(out + row * width + column, narrow(s * inverse * scale, out.dtype.element_ty, WIDEN), mask=real)
    tl.store(epochs + program, epoch)


@triton.jit
def _words(x, epoch, shift, BITS: tl.constexpr):
    """x [WORDS, columns of a word] as words with the number of the call in their upper halves, int64 [WORDS]."""
    kind: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    bits = x.to(kind, bitcast=True).to(tl.int64) << shift
    return tl.sum(bits, 1) + (epoch << 32)


@triton.jit
def _of_words(words, shift, KIND: tl.constexpr, BITS: tl.constexpr):
    """What `_words` was given, fp32 [WORDS, columns of a word]."""
    kind: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    bits = (words[:, None] >> shift) & ((1 << BITS) - 1)
    return bits.to(kind).to(KIND, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def sum_norm_in_words(
    part, weights, ids, local, residual, weight, out, total, rows,
    peers, epochs, eps, bound, width, first, half_size, experts, known, stride,
    ADD: tl.constexpr, NORM: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, PIECES: tl.constexpr, HAS_MAP: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """As `sum_norm`; a row is `stride` words of 32 // BITS elements of BITS bits each."""
    each: tl.constexpr = 32 // BITS
    program = tl.program_id(0)
    word = tl.arange(0, BLOCK // each)
    lane = tl.arange(0, each)[None, :]
    column = word[:, None] * each + lane
    shift = lane.to(tl.int64) * BITS
    real = column < width
    real_word = word * each < width
    kind: tl.constexpr = total.dtype.element_ty
    if NORM:
        scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    after_previous(PDL)
    let_next_start(PDL)
    epoch = tl.load(epochs + program) + 1
    half = epoch % 2
    base = first + half * half_size
    for row in range(program, rows, PROGRAMS):
        x = _own(part, weights, ids, local, row, column, real, rows, width, experts, known, SLOTS, PIECES, HAS_MAP)
        if SLOTS or part.dtype.element_ty != kind:  # a sum in fp32, of one piece too
            x = narrow(x, kind, WIDEN)
        words = _words(x, epoch, shift, BITS)
        for q in tl.static_range(RANKS):
            to = _address(peers, q, base, tl.int64)
            tl.store(to + (RANK * bound + row) * stride + word, words, mask=real_word)
    _raise_flags(peers, half, epoch, rows, RANK, RANKS, PROGRAMS, False)
    if ADD:  # that of the first row, on its way while the others' words are
        there = real & (column * 0 + program < rows)
        added = tl.load(residual + program * width + column, mask=there, other=0.0).to(tl.float32)
    agreed = 0.0
    for q in tl.static_range(RANKS):
        seen = _wait_for(peers, half, epoch, q, RANK, RANKS, PROGRAMS, False)
        agreed = tl.where(seen == rows, agreed, float("nan"))
    own = _address(peers, RANK, base, tl.int64)
    for row in range(program, rows, PROGRAMS):
        s = column.to(tl.float32) * 0.0 + agreed
        for q in tl.static_range(RANKS):
            at = own + (q * bound + row) * stride + word
            words = tl.load(at, mask=real_word, other=epoch << 32, volatile=True)
            # Ranks that disagree about their rows do not wait for those that never come.
            while (tl.min((words >> 32).to(tl.int64), 0) < epoch) & (agreed == 0.0):
                words = tl.load(at, mask=real_word, other=epoch << 32, volatile=True)
            s += _of_words(words, shift, kind, BITS)
        if ADD:
            s += added
            more = row + PROGRAMS
            there = real & (column * 0 + more < rows)
            added = tl.load(residual + more * width + column, mask=there, other=0.0).to(tl.float32)
        kept = narrow(s, kind, WIDEN)
        tl.store(total + row * width + column, kept, mask=real)
        if NORM:
            s = tl.where(real, kept.to(tl.float32), 0.0)
            inverse = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(s * s, 1), 0) / width + eps)
            tl.store(out + row * width + column, narrow(s * inverse * scale, out.dtype.element_ty, WIDEN), mask=real)
    tl.store(epochs + program, epoch)
