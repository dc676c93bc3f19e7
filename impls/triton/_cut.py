"""Where top_k and top_p cut a row of logits, without sorting it.

Logits become unsigned integers in the same order, and the last one that is kept is found from its highest bit to its
lowest: one pass over the row settles two bits by counting (top_k) or weighing (top_p) what lies above three candidates.
Of equal logits at the edge of a cut the first ones are kept, so that a cut is a threshold and the index of the last
token kept among those on it.
"""

import triton
import triton.language as tl

BITS = {"fp32": 32, "fp16": 19, "bf16": 16}  # of a logit's integer


@triton.jit
def ordered(x, BITS: tl.constexpr):
    """Unsigned integers of BITS bits in the order of the fp32 numbers x; -0 is 0, and -inf above the 0 of no token."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)
    return key >> (32 - BITS)


@triton.jit
def _tile(row, start, V, v_stride, TILE: tl.constexpr, BITS: tl.constexpr):
    """(logits, their integers) of TILE tokens; behind the last token -inf and 0."""
    token = start + tl.arange(0, TILE)
    x = tl.load(row + token.to(tl.int64) * v_stride, mask=token < V, other=float("-inf")).to(tl.float32)
    return x, tl.where(token < V, ordered(x, BITS), 0)


@triton.jit
def _weight(x, top, inverse):
    """exp((x - top) / temperature), 0 at -inf."""
    return tl.where(x > float("-inf"), tl.exp((x - top) * inverse), 0.0)


@triton.jit
def _last_with(row, V, v_stride, top, inverse, wanted, WEIGH: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr):
    """Largest integer such that the tokens from it on number (or weigh) at least `wanted`; 0 where all do not."""
    found = tl.full([], 0, tl.uint32)
    for step in range((BITS + 1) // 2):
        unit = tl.full([], 1, tl.uint32) << tl.maximum(BITS - 2 - 2 * step, 0).to(tl.uint32)
        one = found | unit
        two = found | (2 * unit)
        three = two | unit
        above = tl.zeros([TILE], tl.float32)
        above_two = tl.zeros([TILE], tl.float32)
        above_three = tl.zeros([TILE], tl.float32)
        for start in range(0, V, TILE):
            x, key = _tile(row, start, V, v_stride, TILE, BITS)
            share = _weight(x, top, inverse) if WEIGH else 1.0
            above += tl.where(key >= one, share, 0.0)
            above_two += tl.where(key >= two, share, 0.0)
            above_three += tl.where(key >= three, share, 0.0)
        found = tl.where(tl.sum(above) >= wanted, one, found)
        found = tl.where(tl.sum(above_two) >= wanted, two, found)
        found = tl.where(tl.sum(above_three) >= wanted, three, found)
    return found


@triton.jit
def _around(row, V, v_stride, top, inverse, edge, TILE: tl.constexpr, BITS: tl.constexpr):
    """(tokens above `edge`, their weight, tokens on it, weight of one of those)."""
    count = tl.zeros([TILE], tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    equal = tl.zeros([TILE], tl.float32)
    one = tl.zeros([TILE], tl.float32)
    for start in range(0, V, TILE):
        x, key = _tile(row, start, V, v_stride, TILE, BITS)
        weight = _weight(x, top, inverse)
        count += tl.where(key > edge, 1.0, 0.0)
        mass += tl.where(key > edge, weight, 0.0)
        equal += tl.where(key == edge, 1.0, 0.0)
        one = tl.maximum(one, tl.where(key == edge, weight, 0.0))
    return tl.sum(count), tl.sum(mass), tl.sum(equal), tl.max(one)


@triton.jit
def find_cut(
    logits, temperature, top_k, top_p, edges, lasts, V, b_stride, v_stride, t_stride, k_stride, p_stride,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Row program_id(0): a token is kept above edges[row], and on it up to the index lasts[row]."""
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * b_stride
    degrees = tl.load(temperature + b * t_stride).to(tl.float32)
    cut = degrees < 0
    if TOP_K:
        k = tl.load(top_k + b * k_stride).to(tl.int64)
        by_count = (k >= 1) & (k < V)
        cut |= by_count
    if TOP_P:
        p = tl.load(top_p + b * p_stride).to(tl.float32)
        cut |= p < 1
    edge = tl.full([], 0, tl.uint32)
    last = tl.full([], V, tl.int32)
    if (degrees > 0) & cut:
        inverse = tl.minimum(tl.div_rn(1.0, degrees), 3e38)
        highest = tl.full([TILE], float("-inf"), tl.float32)
        for start in range(0, V, TILE):
            highest = tl.maximum(highest, _tile(row, start, V, v_stride, TILE, BITS)[0])
        top = tl.max(highest)
        if TOP_K:  # noqa: SIM102 - settled when the kernel is compiled; `and` would compile what is behind it
            if by_count:
                edge = _last_with(row, V, v_stride, top, inverse, k.to(tl.float32), False, TILE, BITS)
        count, mass, equal, one = _around(row, V, v_stride, top, inverse, edge, TILE, BITS)
        allowed = equal  # tokens kept on the edge
        if TOP_K:
            allowed = tl.where(by_count, k.to(tl.float32) - count, allowed)
        if TOP_P:  # noqa: SIM102
            if p < 1:
                wanted = tl.maximum(p * (mass + allowed * one), 1e-30)  # the likeliest token is always kept
                nucleus = _last_with(row, V, v_stride, top, inverse, wanted, True, TILE, BITS)
                nucleus = tl.maximum(nucleus, edge)
                _, mass, equal, one = _around(row, V, v_stride, top, inverse, nucleus, TILE, BITS)
                needed = tl.where(one > 0, tl.ceil((wanted - mass) / one), equal)
                needed = tl.maximum(tl.minimum(needed, equal), 1.0)
                allowed = tl.where(nucleus == edge, tl.minimum(allowed, needed), needed)
                edge = nucleus
        if allowed < equal:
            seen = tl.full([], 0.0, tl.float32)
            for start in range(0, V, TILE):
                _, key = _tile(row, start, V, v_stride, TILE, BITS)
                on_edge = tl.where(key == edge, 1.0, 0.0)
                order = seen + tl.cumsum(on_edge)
                token = start + tl.arange(0, TILE)
                last = tl.minimum(last, tl.min(tl.where((on_edge > 0) & (order >= allowed), token, V)))
                seen += tl.sum(on_edge)
    tl.store(edges + b, edge.to(tl.int64))
    tl.store(lasts + b, last)
