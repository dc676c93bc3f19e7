"""The stage `paged_attention` in Triton: causal attention of new queries over keys and values in pages.

    out = softmax(scale * q . keys) . values, query head h with key head h // (Hq / Hk)

- Sequence s has the queries query_start[s] to query_start[s + 1] and context_len[s] keys, its queries' own among them:
  the last query sees all keys, the one before it one less.
- Its pages are block_table[s, :ceil(context_len[s] / page)]; entries behind them, and rows behind its length, hold
  anything.  Any strides of the caches.
- A sequence without queries adds nothing, one without keys gives zeros.
- A new tensor in the dtype of q; no input is modified.  Sums in at least fp32.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage paged_attention --impl FILE:paged_attention --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage paged_attention --impl FILE:paged_attention   (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # keys in a tile


@triton.jit
def _attend(
    q, keys, values, table, sequence, visible, out, heads, group, page, D, scale,
    q_t, q_h, q_d, k_p, k_r, k_h, k_d, v_p, v_r, v_h, v_d, t_s, t_m,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head of one query: its keys tile by tile, with a running maximum, sum and output."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, length = tl.load(sequence + token), tl.load(visible + token)
    at = tl.arange(0, WIDTH)
    query = tl.load(q + token * q_t + head * q_h + at * q_d, mask=at < D, other=0.0).to(tl.float32)
    top, total = -float("inf"), 0.0
    result = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, length, TILE):
        key = start + tl.arange(0, TILE)
        seen = key < length
        number = tl.load(table + s * t_s + key // page * t_m, mask=seen, other=0).to(tl.int64)[:, None]
        row, here = (key % page)[:, None], seen[:, None] & (at < D)[None, :]
        k = tl.load(keys + number * k_p + row * k_r + head // group * k_h + at[None, :] * k_d, mask=here, other=0.0)
        v = tl.load(values + number * v_p + row * v_r + head // group * v_h + at[None, :] * v_d, mask=here, other=0.0)
        scores = tl.where(seen, tl.sum(k.to(tl.float32) * query[None, :], 1) * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        shrunk, powers = tl.exp(top - higher), tl.exp(scores - higher)
        total = total * shrunk + tl.sum(powers, 0)
        result = result * shrunk + tl.sum(powers[:, None] * v.to(tl.float32), 0)
        top = higher
    total = tl.where(length > 0, total, 1.0)
    tl.store(out + (token * heads + head) * D + at, result / total, mask=at < D)


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
    T, heads, D = q.shape
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    starts = query_start.long()
    sequence = torch.repeat_interleave(torch.arange(len(context_len), device=q.device), starts.diff())
    # The last query of a sequence sees all keys, each one before it one less.
    visible = context_len.long()[sequence] - (starts[sequence + 1] - 1 - torch.arange(T, device=q.device))
    if T:
        _attend[T, heads](
            q, key_cache, value_cache, block_table, sequence, visible, out,
            heads, heads // key_cache.shape[2], key_cache.shape[1], D, float(scale),
            *q.stride(), *key_cache.stride(), *value_cache.stride(), *block_table.stride(),
            triton.next_power_of_2(D), BLOCK,
        )  # fmt: skip
    return out.to(q.dtype)  # to be stored so by the kernel; the interpreter cuts bf16 off instead of rounding


# What it promises; optional, and what is promised is judged.
paged_attention.rounds = ()
paged_attention.deterministic = True
