"""Paged attention in replaceable steps, sequence by sequence and in parts of a sequence's keys: `run` is right."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[..., Any]


def pages_of(table: Tensor, s: int, length: int, page: int) -> Tensor:
    """The pages of sequence s."""
    return table[s, : -(-length // page)].long()


def gathered(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """Keys or values in order, [length, Hk, D]."""
    return cache[pages].flatten(0, 1)[:length]


def seen(count: int, length: int) -> Tensor:
    """Bool [count, length], the keys that each query sees."""
    return torch.arange(length) <= torch.arange(length - count, length)[:, None]


def shared_by(heads: int, kv_heads: int) -> Tensor:
    """The key/value head of each query head."""
    return torch.arange(heads) // (heads // kv_heads)


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax over all keys at once, in fp32: [n, H, D]."""
    scores = torch.einsum("nhd,lhd->nhl", q, keys) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nhl,lhd->nhd", weights, values)


def parts_of(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, size: int = 16) -> list[tuple]:
    """(unnormalised result, largest score, sum of weights) of runs of `size` keys."""
    found = []
    for start in range(0, len(keys), size):
        run = slice(start, start + size)
        scores = torch.einsum("nhd,lhd->nhl", q, keys[run]) * scale
        scores = scores.masked_fill(~visible[:, None, run], -torch.inf)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
        found.append((torch.einsum("nhl,lhd->nhd", weights, values[run]), top, weights.sum(-1, keepdim=True)))
    return found


class Steps(NamedTuple):
    """The step that rounds: an implementation with other roundings has another."""

    attend: Step = attend


RIGHT = Steps()


def run(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *,
    scale: float, pages_of: Step = pages_of, gathered: Step = gathered, seen: Step = seen, shared_by: Step = shared_by,
    attend: Step | None = None, empty: float = 0.0, steps: Steps = RIGHT,
) -> Tensor:  # fmt: skip
    """A right implementation; the last keywords replace its steps."""
    attend = attend or steps.attend
    out = torch.zeros(q.shape, dtype=q.dtype)
    bounds, page = query_start.tolist(), key_cache.shape[1]
    for s, length in enumerate(context_len.tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        count = rows.stop - rows.start
        if count == 0:
            continue
        if length == 0:
            out[rows] = empty
            continue
        pages = pages_of(block_table, s, length, page)
        of_head = shared_by(q.shape[1], key_cache.shape[2])
        keys, values = (gathered(cache, pages, length).float()[:, of_head] for cache in (key_cache, value_cache))
        out[rows] = attend(q[rows].float(), keys, values, seen(count, len(keys)), scale).to(q.dtype)
    return out
