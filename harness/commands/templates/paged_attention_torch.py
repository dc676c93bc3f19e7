"""The stage `paged_attention`: causal attention of new queries over keys and values in pages.

    out = softmax(scale * q . keys) . values, query head h with key head h // (Hq / Hk)

- Sequence s has the queries query_start[s] to query_start[s + 1] and context_len[s] keys, its queries' own among them:
  the last query sees all keys, the one before it one less.
- Its pages are block_table[s, :ceil(context_len[s] / page)]; entries behind them, and rows behind its length, hold
  anything. Any strides of the caches.
- A sequence without queries adds nothing, one without keys gives zeros.
- A new tensor in the dtype of q; no input is modified. Sums in at least fp32.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage paged_attention --impl FILE:paged_attention
"""

import torch
from torch import Tensor


def paged_attention(
    q: Tensor,  # [T, Hq, D]
    key_cache: Tensor,  # [P, page, Hk, D]
    value_cache: Tensor,  # [P, page, Hk, D]
    block_table: Tensor,  # int [S, M]
    query_start: Tensor,  # int [S + 1]
    context_len: Tensor,  # int [S]
    *,
    scale: float,
) -> Tensor:  # [T, Hq, D]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    page, group = key_cache.shape[1], q.shape[1] // key_cache.shape[2]
    starts = query_start.tolist()
    for s, length in enumerate(context_len.tolist()):
        queries = q[starts[s] : starts[s + 1]].float()
        if not length or not len(queries):
            continue
        pages = block_table[s, : -(-length // page)].long()
        read = (cache[pages].flatten(0, 1)[:length].float() for cache in (key_cache, value_cache))
        keys, values = (rows.repeat_interleave(group, 1) for rows in read)
        scores = torch.einsum("nhd,lhd->hnl", queries, keys) * scale
        last = torch.arange(length - len(queries), length, device=q.device)  # the last key that each query sees
        hidden = torch.arange(length, device=q.device) > last[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[starts[s] : starts[s + 1]] = torch.einsum("hnl,lhd->nhd", weights, values).to(q.dtype)
    return out


# What it promises; optional, and what is promised is judged.
paged_attention.rounds = ()
paged_attention.deterministic = True
