"""Exact data of the stage `paged_attention`: every query picks one key, and gets its value bit for bit.

A score is 0 for one key and -128 or less for all others, so that its weight is 1 and theirs vanish in fp32, whatever
the order, the blocks and the parts of the softmax.  Three kinds of head pick:

    any       a key drawn for the query: the query is the key's code, and every key of a head has a code of its own
    latest    the last key that the query may see: a key's first element is its position, and scores fall with distance
    first     the first key, in the same way

Codes are of 1 and -1, in elements 2 and further; element 1 of every key is 1, so that a query can subtract a constant.
"""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Builder, Call
from moe_harness.harness.stages.paged_attention.cases import PagedAttentionCase

SHARP = 64.0  # a query's elements: codes differ by 2 in one element at least
ANY, LATEST, FIRST = range(3)


def kind_of(head: int) -> int:
    """How a query head picks: every second one anything."""
    return (ANY, LATEST, ANY, FIRST)[head % 4]


def codes(count: int, width: int) -> Tensor:
    """[count, width] of 1 and -1, no two alike for up to 2^width keys."""
    bits = torch.arange(count)[:, None] >> torch.arange(width) & 1
    return bits * 2.0 - 1.0


def pointed(
    case: PagedAttentionCase, draw: Builder, shapes: list[tuple[int, int]], table: Tensor, pages: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, key cache, value cache) in fp32; keys at the same place of two sequences are the same."""
    kind = draw.dtype if case.data == "large" else torch.float32
    keys, values = (torch.zeros(pages, case.page, case.Hk, case.D, dtype=kind) for _ in range(2))
    longest = max((length for _, length in shapes), default=0)
    code = codes(longest, case.D - 2) if longest else torch.zeros(0, case.D - 2)
    for s, (_, length) in enumerate(shapes):
        at = torch.arange(length)
        page, offset = table[s, at // case.page], at % case.page
        keys[page, offset] = torch.cat([at[:, None], 0 * at[:, None] + 1, code[:length]], 1)[:, None].to(kind)
        values[page, offset] = draw.integers(-100, 101, (length, case.Hk, case.D)).to(kind)
    queries = [_queries(case, draw, code, count, length) for count, length in shapes]
    return torch.cat([torch.zeros(0, case.Hq, case.D), *queries]), keys, values


def _queries(case: PagedAttentionCase, draw: Builder, code: Tensor, count: int, length: int) -> Tensor:
    """Queries [count, Hq, D] of one sequence of `length` keys."""
    q = torch.zeros(count, case.Hq, case.D)
    last = torch.arange(length - count, length)
    wanted = (draw.uniform(count, case.Hq) * (last[:, None] + 1)).long()
    for head in range(case.Hq if length else 0):
        if kind_of(head) == ANY:
            q[:, head, 2:] = SHARP * code[wanted[:, head]]
            q[:, head, 1] = -SHARP * code.shape[1]
        else:
            latest = kind_of(head) == LATEST
            q[:, head, 0] = 2 * SHARP if latest else -2 * SHARP
            q[:, head, 1] = -2 * SHARP * last if latest else 0.0
    return q


def picked(call: Call) -> Tensor:
    """What each query gets, fp64 [T, Hq, D], read from the operands."""
    from moe_harness.harness.stages.paged_attention.stage import sequences

    q = call.args["q"].double()
    out = torch.zeros_like(q)
    for rows, keys, values in sequences(call):
        group, count = q.shape[1] // keys.shape[1], rows.stop - rows.start
        wide = keys.double().repeat_interleave(group, dim=1)
        scores = torch.einsum("nhd,lhd->nhl", q[rows], wide)
        position = torch.arange(len(keys) - count, len(keys), device=q.device)
        hidden = torch.arange(len(keys), device=q.device) > position[:, None]
        best = scores.masked_fill(hidden[:, None], -torch.inf).argmax(-1)
        of_head = torch.arange(q.shape[1], device=q.device) // group
        out[rows] = values.double()[best, of_head]
    return out
