"""Causal attention over a paged cache: each sequence's pages are gathered in turn and attended to in fp32."""

import torch
from torch import Tensor

__all__ = ["paged_attention"]


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *,
    scale: float,
) -> Tensor:  # fmt: skip
    """The stage `paged_attention`: q [T, Hq, D], caches [P, page, Hk, D] of any strides -> [T, Hq, D].

    block_table is int [S, M], query_start int [S + 1], context_len int [S].  Lengths are read on the host: no graph.
    Queries before the first key (of a sequence without keys, say) give zeros, as do rows that belong to no sequence.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check(q, key_cache, value_cache, block_table, query_start, context_len)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds, lengths, page_size = query_start.tolist(), context_len.tolist(), key_cache.shape[1]
    for s, length in enumerate(lengths):
        start, stop = bounds[s], bounds[s + 1]
        if length > 0 and start < stop:
            pages = block_table[s, : -(-length // page_size)].long()
            keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (key_cache, value_cache))
            out[start:stop] = _attend(q[start:stop], keys, values, scale)
    return out


paged_attention.rounds = ()
paged_attention.deterministic = True


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [n, Hq, D], keys and values [length, Hk, D] -> [n, Hq, D] in at least fp32."""
    count, length, heads = len(q), len(keys), keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(count, heads, -1, q.shape[2]).permute(1, 2, 0, 3)  # [Hk, group, n, D]
    keys, values = (x.to(wide).transpose(0, 1)[:, None] for x in (keys, values))  # [Hk, 1, length, D]
    scores = grouped @ keys.transpose(2, 3) * scale
    last = torch.arange(length - count, length, device=q.device)[:, None]  # key that query n sees last
    hidden = torch.arange(length, device=q.device) > last
    weights = scores.masked_fill(hidden, -torch.inf).softmax(3).masked_fill(last < 0, 0.0)
    return (weights @ values).permute(2, 0, 1, 3).reshape(q.shape)


def check(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: which ones, and what they should be.
    """
    heads, width, sequences = key_cache.shape[2], q.shape[2], len(context_len)
    wanted = {
        "key_cache": (key_cache, (*key_cache.shape[:3], width)), "value_cache": (value_cache, tuple(key_cache.shape)),
        "block_table": (block_table, (sequences, block_table.shape[-1])),
        "query_start": (query_start, (sequences + 1,)), "context_len": (context_len, (sequences,)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape} beside q of {tuple(q.shape)}")
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads do not share {heads} key/value heads evenly")
