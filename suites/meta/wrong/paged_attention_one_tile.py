"""Attention whose tile holds 16 rows: the query heads of one key/value head.

Mistake: with more heads than that the others are never written.
"""

import torch


def sixteen_heads_a_group(q, key_cache, value_cache, block_table, query_start, context_len, *, scale):
    out, page, group = torch.zeros_like(q).contiguous(), key_cache.shape[1], q.shape[1] // key_cache.shape[2]
    for s, length in enumerate(context_len.tolist()):
        rows, at = slice(*query_start[s : s + 2].tolist()), torch.arange(length)
        queries = q[rows].float()
        if not length or not len(queries):
            continue
        pages = block_table[s].long()[at // page]
        keys, values = (c[pages, at % page].float() for c in (key_cache, value_cache))
        unseen = at > torch.arange(length - len(queries), length)[:, None]
        for head in range(key_cache.shape[2]):
            tile = slice(head * group, head * group + min(group, 16))
            score = torch.einsum("nhd,ld->hnl", queries[:, tile], keys[:, head]) * scale
            weights = score.masked_fill(unseen, -torch.inf).softmax(-1)
            out[rows, tile] = torch.einsum("hnl,ld->nhd", weights, values[:, head]).to(q.dtype)
    return out
