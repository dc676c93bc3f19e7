r"""Causal attention of new queries over keys and values that lie in pages (PagedAttention, arXiv:2309.06180).

    out[t] = softmax(scale * q[t] . K[: p + 1]) V[: p + 1]      p the position of token t in its sequence

Sequence s has context_len[s] keys, those of its queries among them and last: its j-th of n queries is at position
context_len[s] - n + j.  Query head h attends with key/value head h // (Hq / Hk) (grouped queries, arXiv:2305.13245).
"""

import torch
from torch import Tensor


def gather(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` keys or values of the sequence whose pages, in order, are `pages`: [length, Hk, D]."""
    page_size = cache.shape[1]
    return cache[pages[: -(-length // page_size)].long()].flatten(0, 1)[:length]


def attention(q: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """Causal attention of q [n, Hq, D], the last n tokens, over keys and values [length, Hk, D]: [n, Hq, D]."""
    count, length = len(q), len(keys)
    keys, values = (x.to(q.dtype).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,lhd->hnl", q, keys) * scale
    position = torch.arange(length - count, length, device=q.device)
    visible = torch.arange(length, device=q.device) <= position[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, values)


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention of every sequence's queries over its own pages.

    Args:
        q: [T, Hq, D], sequence after sequence; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        key_cache, value_cache: [P, page, Hk, D].
        block_table: int [S, M], the pages of each sequence in order; entries past its length are never looked at.
        query_start: int [S + 1]; the queries of sequence s are rows query_start[s] to query_start[s + 1].
        context_len: int [S], number of keys of each sequence.

    Returns:
        [T, Hq, D]; zeros for the queries of a sequence without keys.
    """
    out = torch.zeros_like(q)
    bounds, lengths = query_start.tolist(), context_len.tolist()
    for s, length in enumerate(lengths):
        rows = slice(bounds[s], bounds[s + 1])
        if length > 0 and rows.start < rows.stop:
            keys, values = (gather(cache, block_table[s], length) for cache in (key_cache, value_cache))
            out[rows] = attention(q[rows], keys, values, scale=scale)
    return out
