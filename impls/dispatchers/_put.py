"""Kernels that write rows straight into the memory of other ranks over NVLink: no NCCL, no multicast, no host read.

Every rank runs the same kernels in the same order with the same number of programs.  A program puts its tiles into the
buffer of each peer, raises its flag there, waits for the same program of every peer, and goes on with the tiles that
those put here.  A counter in device memory numbers the calls, so a captured graph can be replayed; it chooses one of
two halves of the buffer: a peer can only come to call n + 2 after this rank is done with call n, since the flags of
call n + 1 are raised behind it on the stream.  All calls on one workspace have to be on one stream.
"""

import triton
import triton.language as tl

PROGRAMS = 64
TILE = 1024
MAX_TOP_K = 16


@triton.jit
def _address(peers, q, offset, kind: tl.constexpr):
    """Where `offset` bytes into the buffer of rank q is, as a pointer to `kind`."""
    return tl.multiple_of((tl.load(peers + q) + offset).to(tl.pointer_type(kind)), 16)


@triton.jit
def _raise_flags(
    peers, half, epoch, count, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
    BEHIND: tl.constexpr = True,
):  # fmt: skip
    """Tell the same program of every rank this rank's number of tokens, and if BEHIND that its tiles are there."""
    if BEHIND:
        tl.debug_barrier()
    place = (half * PROGRAMS + tl.program_id(0)) * RANKS + RANK
    order: tl.constexpr = "release" if BEHIND else "relaxed"
    for q in tl.static_range(RANKS):
        flags = _address(peers, q, 0, tl.int64)
        tl.atomic_xchg(flags + place, (epoch << 32) + count, sem=order, scope="sys")


@triton.jit
def _wait_for(
    peers, half, epoch, q, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, BEHIND: tl.constexpr = True
):
    """Wait for rank q's flag of this call, if BEHIND until its tiles are there; its number of tokens."""
    order: tl.constexpr = "acquire" if BEHIND else "relaxed"
    flag = _address(peers, RANK, 0, tl.int64) + (half * PROGRAMS + tl.program_id(0)) * RANKS + q
    seen = tl.atomic_add(flag, 0, sem=order, scope="sys")
    while (seen >> 32) < epoch:
        seen = tl.atomic_add(flag, 0, sem=order, scope="sys")
    if BEHIND:
        tl.debug_barrier()
    return seen & 0xFFFFFFFF


@triton.jit(do_not_specialize=["tokens"])
def gather(
    hidden, weights, ids, out_hidden, out_weights, out_ids, counts, tokens,
    table, peers, epochs, bound, width, top_k, num_experts, first, half_size, at_weights, at_ids,
    RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Rows, weights and ids of all ranks: row t of rank q at q * bound + t; ids local, -1 beyond a rank's tokens.

    A rank with more than `bound` tokens puts the first of them; `counts` tells.
    """
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    half = epoch % 2
    base = first + half * half_size
    slot = tl.arange(0, SLOTS)
    columns = tl.arange(0, TILE)
    tiles = tl.cdiv(width, TILE)
    for tile in range(program, tl.minimum(tokens, bound) * tiles, PROGRAMS):
        row = tile // tiles
        column = tile % tiles * TILE + columns
        x = tl.load(hidden + row * width + column, mask=column < width)
        for q in tl.static_range(RANKS):
            to = _address(peers, q, base, hidden.dtype.element_ty)
            tl.store(to + (RANK * bound + row) * width + column, x, mask=column < width)
        if tile % tiles == 0:
            w = tl.load(weights + row * top_k + slot, mask=slot < top_k)
            e = tl.load(ids + row * top_k + slot, mask=slot < top_k)
            place = (RANK * bound + row) * top_k + slot
            for q in tl.static_range(RANKS):
                to_weights = _address(peers, q, base + at_weights, weights.dtype.element_ty)
                to_ids = _address(peers, q, base + at_ids, ids.dtype.element_ty)
                tl.store(to_weights + place, w, mask=slot < top_k)
                tl.store(to_ids + place, e, mask=slot < top_k)
    _raise_flags(peers, half, epoch, tokens, RANK, RANKS, PROGRAMS)
    own = _address(peers, RANK, base, hidden.dtype.element_ty)
    own_weights = _address(peers, RANK, base + at_weights, weights.dtype.element_ty)
    own_ids = _address(peers, RANK, base + at_ids, ids.dtype.element_ty)
    for q in tl.static_range(RANKS):
        count = _wait_for(peers, half, epoch, q, RANK, RANKS, PROGRAMS)
        if program == 0:
            tl.store(counts + q, count)
        for tile in range(program, bound * tiles, PROGRAMS):
            row = q * bound + tile // tiles
            there = tile // tiles < count
            column = tile % tiles * TILE + columns
            if there:
                x = tl.load(own + row * width + column, mask=column < width, cache_modifier=".cg")
                tl.store(out_hidden + row * width + column, x, mask=column < width)
            if tile % tiles == 0:
                place = row * top_k + slot
                real = (slot < top_k) & (slot * 0 + tile // tiles < count)
                w = tl.load(own_weights + place, mask=real, other=0.0, cache_modifier=".cg")
                e = tl.load(own_ids + place, mask=real, other=-1, cache_modifier=".cg")
                local = tl.load(table + tl.where(e < 0, num_experts, e), mask=slot < top_k)
                tl.store(out_weights + place, w, mask=slot < top_k)
                tl.store(out_ids + place, local.to(ids.dtype.element_ty), mask=slot < top_k)
    tl.store(epochs + program, epoch)


@triton.jit(do_not_specialize=["tokens"])
def scatter_sum(
    values, counts, out, tokens, peers, epochs, bound, width, first, half_size,
    RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over ranks, in their order and in fp32, of their row RANK * bound + t of `values`."""
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    half = epoch % 2
    base = first + half * half_size
    columns = tl.arange(0, TILE)
    tiles = tl.cdiv(width, TILE)
    for q in tl.static_range(RANKS):
        to = _address(peers, q, base, values.dtype.element_ty)
        for tile in range(program, tl.load(counts + q) * tiles, PROGRAMS):
            row = tile // tiles
            column = tile % tiles * TILE + columns
            x = tl.load(values + (q * bound + row) * width + column, mask=column < width)
            tl.store(to + (RANK * bound + row) * width + column, x, mask=column < width)
    _raise_flags(peers, half, epoch, tokens, RANK, RANKS, PROGRAMS)
    for q in tl.static_range(RANKS):
        _wait_for(peers, half, epoch, q, RANK, RANKS, PROGRAMS)
    own = _address(peers, RANK, base, values.dtype.element_ty)
    for tile in range(program, tokens * tiles, PROGRAMS):
        row = tile // tiles
        column = tile % tiles * TILE + columns
        total = tl.zeros((TILE,), tl.float32)
        for q in tl.static_range(RANKS):
            at = own + (q * bound + row) * width + column
            total += tl.load(at, mask=column < width, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=column < width)
    tl.store(epochs + program, epoch)
