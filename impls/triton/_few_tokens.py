r"""The experts for a few tokens: two launches, no alignment, no tensor cores.

    act[s]  = activation(g) * u,  [g; u] = gate_up[e] @ x[t]        one program per slot s = (t, j) and BN columns
    out[t]  = sum over j of w[t, j] * (down[e] @ act[s])            one program per token and BN columns

With a handful of slots nearly every expert has one row, so a product is a walk over its weights: each thread keeps its
own partial sums and they are added across threads once, at the end.  Nothing is rounded before the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from impls.triton._common import after_previous, early_start, gated, let_next_start, on
from impls.triton.alignment import local_expert
from impls.triton.configs import Walk


@triton.jit
def _few_gate_up(
    x, w, act, ids, emap, S, H, WIDTH, top_k, E, map_len, id_row, id_col, x_row, x_col, w_e, w_n, w_k,
    HAS_MAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[slot, BN columns] in fp32; nothing is written for a masked slot."""
    slot = tl.program_id(1)
    let_next_start(PDL)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    if e >= 0:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        x += (slot // top_k).to(tl.int64) * x_row
        gate = w + e.to(tl.int64) * w_e + n[:, None].to(tl.int64) * w_n
        up = w + e.to(tl.int64) * w_e + (n + WIDTH)[:, None].to(tl.int64) * w_n
        g = tl.zeros((BN, BK), tl.float32)
        u = tl.zeros((BN, BK), tl.float32)
        for k0 in range(0, H, BK):
            k = k0 + tl.arange(0, BK)
            inside = (n < WIDTH)[:, None] & (k < H)[None, :]
            w_g = tl.load(gate + k[None, :].to(tl.int64) * w_k, mask=inside, other=0.0)
            w_u = tl.load(up + k[None, :].to(tl.int64) * w_k, mask=inside, other=0.0)
            row = tl.load(x + k.to(tl.int64) * x_col, mask=k < H, other=0.0).to(tl.float32)[None, :]
            g += w_g.to(tl.float32) * row
            u += w_u.to(tl.float32) * row
        out = gated(tl.sum(g, 1), tl.sum(u, 1), GELU)
        tl.store(act + slot.to(tl.int64) * WIDTH + n, out, mask=n < WIDTH)


@triton.jit
def _few_down(
    act, w, weights, ids, emap, out, S, H, WIDTH, E, map_len, id_row, id_col, r_row, r_col, w_e, w_n, w_k,
    HAS_MAP: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, BN columns] from tiles [BJ slots, BN, BK] of weights; the first is read before `act` is ready."""
    t = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, BJ)
    k = tl.arange(0, BK)
    slot = t * K + j
    e = local_expert(ids, emap, slot, j < K, K, id_row, id_col, map_len, E, HAS_MAP)
    here = e >= 0
    weight = tl.load(weights + t.to(tl.int64) * r_row + j.to(tl.int64) * r_col, mask=here, other=0.0).to(tl.float32)
    rows = tl.maximum(e, 0).to(tl.int64)[:, None] * w_e + n[None, :].to(tl.int64) * w_n
    base = w + rows[:, :, None]
    live = here[:, None, None] & (n < H)[None, :, None]
    tile = tl.load(base + k[None, None, :].to(tl.int64) * w_k, mask=live & (k < WIDTH)[None, None, :], other=0.0)
    after_previous(PDL)
    acc = tl.zeros((BN,), tl.float32)
    for k0 in range(0, WIDTH, BK):
        inside = here[:, None] & (k0 + k < WIDTH)[None, :]
        row = tl.load(act + slot.to(tl.int64)[:, None] * WIDTH + (k0 + k)[None, :], mask=inside, other=0.0)
        row = row * weight[:, None]
        acc += tl.sum(tl.sum(tile.to(tl.float32) * row[:, None, :], 2), 0)
        ahead = k0 + BK + k
        at = base + ahead[None, None, :].to(tl.int64) * w_k
        tile = tl.load(at, mask=live & (ahead < WIDTH)[None, None, :], other=0.0)
    tl.store(out + t.to(tl.int64) * H + n, acc.to(out.dtype.element_ty), mask=n < H)


def few_tokens(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor,
    activation: str, expert_map: Tensor | None, walk: Walk,
) -> Tensor:  # fmt: skip
    """[T, H] for x [T, H], gate_up [E, 2I, H], down [E, H, I], weights and ids [T, k], any strides."""
    (tokens, top_k), (experts, hidden, width) = ids.shape, down.shape
    act = torch.empty(tokens * top_k, width, dtype=torch.float32, device=x.device)
    out = x.new_empty(tokens, hidden)
    emap = ids if expert_map is None else expert_map.contiguous()
    early = early_start(x.device)
    with on(x.device):
        _few_gate_up[(triton.cdiv(width, walk.up_n), tokens * top_k)](
            x, gate_up, act, ids, emap, tokens * top_k, hidden, width, top_k, experts, emap.numel(),
            *ids.stride(), *x.stride(), *gate_up.stride(), HAS_MAP=expert_map is not None,
            BN=walk.up_n, BK=walk.up_k, GELU=activation == "gelu_tanh", PDL=early, num_warps=walk.up_warps,
        )  # fmt: skip
        _few_down[(triton.cdiv(hidden, walk.down_n), tokens)](
            act, down, weights, ids, emap, out, tokens * top_k, hidden, width, experts, emap.numel(),
            *ids.stride(), *weights.stride(), *down.stride(), HAS_MAP=expert_map is not None,
            K=top_k, BJ=triton.next_power_of_2(top_k), BN=walk.down_n, BK=walk.down_k, PDL=early,
            num_warps=walk.down_warps, launch_pdl=early,
        )  # fmt: skip
    return out
