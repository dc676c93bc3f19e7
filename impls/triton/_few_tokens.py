r"""The experts for a few tokens: two launches, no alignment.

    act[s]  = activation(g) * u,  [g; u] = gate_up[e] @ x[t]        one program per slot s = (t, j) and BN columns
    out[t]  = sum over j of w[t, j] * (down[e] @ act[s])            one program per token and BN columns

With a handful of slots nearly every expert has one row, so every slot is a tile of its own: one real row among the 16
that the tensor cores want.  The second kernel walks all slots of its token in one loop, so that the weights of the next
slot are on their way while this one is added; the sum is taken in fp32 at the end of each slot.

Rounded to the input dtype on the way: act alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from impls.triton._common import (
    after_previous,
    early_start,
    gated,
    interpreting,
    let_next_start,
    on,
    product,
    tile_source,
)
from impls.triton._tiles import pick, row_tile, weight_tile
from impls.triton.alignment import local_expert
from impls.triton.configs import Walk

ROWS: tl.constexpr = tl.constexpr(16)  # the smallest row tile of a product


@triton.jit
def _few_gate_up(
    x, w, act, ids, emap, S, H, WIDTH, top_k, E, map_len, id_row, id_col, x_row, x_col, w_e, w_n, w_k,
    HAS_MAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    GELU: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[slot, BN columns]; nothing is written for a masked slot."""
    let_next_start(PDL)
    slot = tl.program_id(1)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    if e >= 0:
        n0 = tl.program_id(0) * BN
        row = tl.arange(0, ROWS)
        token = row * 0 + slot // top_k
        g = tl.zeros((ROWS, BN), tl.float32)
        u = tl.zeros((ROWS, BN), tl.float32)
        for k0 in tl.range(0, H, BK):
            rows_x = row_tile(x, token, row == 0, k0, H, x_row, x_col, BK, EVEN_K)
            w_g = weight_tile(w, e, n0, k0, WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
            w_u = weight_tile(w, e, n0 + WIDTH, k0, 2 * WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
            g = product(rows_x, w_g.T, g, WIDEN)
            u = product(rows_x, w_u.T, u, WIDEN)
        col = n0 + tl.arange(0, BN)
        at = act + slot.to(tl.int64) * WIDTH + row[:, None] * 0 + col[None, :]
        mask = (row == 0)[:, None] & (col < WIDTH)[None, :]
        tl.store(at, gated(g, u, GELU).to(act.dtype.element_ty), mask=mask)


@triton.jit
def _few_down(
    act, w, weights, ids, emap, out, H, WIDTH, E, map_len, id_row, id_col, r_row, r_col, w_e, w_n, w_k,
    HAS_MAP: tl.constexpr, K: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, BN columns]; a masked slot walks over expert 0 and its sum is left out."""
    t = tl.program_id(1)
    n0 = tl.program_id(0) * BN
    j = tl.arange(0, BJ)
    e = local_expert(ids, emap, t * K + j, j < K, K, id_row, id_col, map_len, E, HAS_MAP)
    at = weights + t.to(tl.int64) * r_row + j.to(tl.int64) * r_col
    weight = tl.load(at, mask=e >= 0, other=0.0).to(tl.float32)
    after_previous(PDL)
    row = tl.arange(0, ROWS)
    steps = tl.cdiv(WIDTH, BK)
    acc = tl.zeros((ROWS, BN), tl.float32)
    total = tl.zeros((ROWS, BN), tl.float32)
    for step in tl.range(0, K * steps):
        slot = step // steps
        k0 = (step - slot * steps) * BK
        expert = pick(e, slot, BJ)
        rows_a = row_tile(act, row * 0 + t * K + slot, row == 0, k0, WIDTH, WIDTH, 1, BK, EVEN_K)
        w_tile = weight_tile(w, tl.maximum(expert, 0), n0, k0, H, WIDTH, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
        acc = product(rows_a, w_tile.T, acc, WIDEN)
        last = k0 + BK >= WIDTH
        total = tl.where(last & (expert >= 0), total + pick(weight, slot, BJ) * acc, total)
        acc = tl.where(last, 0.0, acc)
    col = n0 + tl.arange(0, BN)
    mask = (row == 0)[:, None] & (col < H)[None, :]
    tl.store(out + t.to(tl.int64) * H + row[:, None] * 0 + col[None, :], total.to(out.dtype.element_ty), mask=mask)


def few_tokens(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor,
    activation: str, expert_map: Tensor | None, walk: Walk,
) -> Tensor:  # fmt: skip
    """[T, H] for x [T, H], gate_up [E, 2I, H], down [E, H, I], weights and ids [T, k], any strides."""
    (tokens, top_k), (experts, hidden, width) = ids.shape, down.shape
    act, out = x.new_empty(tokens * top_k, width), x.new_empty(tokens, hidden)
    emap = ids if expert_map is None else expert_map.contiguous()
    w_up, tma_up = tile_source(gate_up, [1, walk.up_n, walk.up_k], True)
    w_down, tma_down = tile_source(down, [1, walk.down_n, walk.down_k], True)
    early = early_start(x.device)
    with on(x.device):
        _few_gate_up[(triton.cdiv(width, walk.up_n), tokens * top_k)](
            x, w_up, act, ids, emap, tokens * top_k, hidden, width, top_k, experts, emap.numel(),
            *ids.stride(), *x.stride(), *gate_up.stride(), HAS_MAP=expert_map is not None,
            BN=walk.up_n, BK=walk.up_k, EVEN_K=hidden % walk.up_k == 0, TMA=tma_up, GELU=activation == "gelu_tanh",
            WIDEN=interpreting(), PDL=early, num_warps=walk.up_warps, num_stages=walk.up_stages,
        )  # fmt: skip
        _few_down[(triton.cdiv(hidden, walk.down_n), tokens)](
            act, w_down, weights, ids, emap, out, hidden, width, experts, emap.numel(),
            *ids.stride(), *weights.stride(), *down.stride(), HAS_MAP=expert_map is not None,
            K=top_k, BJ=triton.next_power_of_2(top_k), BN=walk.down_n, BK=walk.down_k,
            EVEN_K=width % walk.down_k == 0, TMA=tma_down, WIDEN=interpreting(), PDL=early, launch_pdl=early,
            num_warps=walk.down_warps, num_stages=walk.down_stages,
        )  # fmt: skip
    return out
