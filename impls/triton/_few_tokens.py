r"""The experts for a few tokens: two launches, no alignment; the weighted sum follows as behind the tiled products.

    act[s]  = activation(g) * u,  [g; u] = gate_up[e] @ x[t]        one program per slot s = (t, j) and BN columns
    y[s]    = down[e] @ act[s]                                      likewise

With a handful of slots nearly every expert has one row, so every slot is a tile of its own: one real row among the 16
that the tensor cores want.  A masked slot ends its programs at once.

Rounded to the input dtype on the way: act and y.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    gated,
    interpreting,
    let_next_start,
    narrow,
    on,
    product,
    tile_source,
)
from moe_harness.impls.triton._tiles import row_tile, weight_tile
from moe_harness.impls.triton.alignment import local_expert
from moe_harness.impls.triton.configs import Walk

ROWS: tl.constexpr = tl.constexpr(16)  # the smallest row tile of a product


@triton.jit
def _few_gate_up(
    x, w, act, ids, emap, S, H, WIDTH, top_k, E, map_len, id_row, id_col, x_row, x_col, w_e, w_n, w_k,
    HAS_MAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    GELU: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[slot, BN columns]; nothing is written for a masked slot."""
    after_previous(PDL)
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
        tl.store(at, narrow(gated(g, u, GELU, act.dtype.element_ty), act.dtype.element_ty, WIDEN), mask=mask)


@triton.jit
def _few_down(
    act, w, y, ids, emap, S, H, WIDTH, top_k, E, map_len, id_row, id_col, w_e, w_n, w_k,
    HAS_MAP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[slot, BN columns]; nothing is written for a masked slot."""
    slot = tl.program_id(1)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    after_previous(PDL)
    let_next_start(PDL)
    if e >= 0:
        n0 = tl.program_id(0) * BN
        row = tl.arange(0, ROWS)
        acc = tl.zeros((ROWS, BN), tl.float32)
        for k0 in tl.range(0, WIDTH, BK):
            rows_a = row_tile(act, row * 0 + slot, row == 0, k0, WIDTH, WIDTH, 1, BK, EVEN_K)
            w_tile = weight_tile(w, e, n0, k0, H, WIDTH, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
            acc = product(rows_a, w_tile.T, acc, WIDEN)
        col = n0 + tl.arange(0, BN)
        mask = (row == 0)[:, None] & (col < H)[None, :]
        at = y + slot.to(tl.int64) * H + row[:, None] * 0 + col[None, :]
        tl.store(at, narrow(acc, y.dtype.element_ty, WIDEN), mask=mask)


def few_tokens(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, activation: str, expert_map: Tensor | None, walk: Walk
) -> Tensor:
    """y [T * k, H] for x [T, H], gate_up [E, 2I, H], down [E, H, I] and ids [T, k], any strides."""
    (tokens, top_k), (experts, hidden, width) = ids.shape, down.shape
    slots = tokens * top_k
    act, y = empty(x, slots, width), empty(x, slots, hidden)
    emap = ids if expert_map is None else expert_map.contiguous()
    w_up, tma_up = tile_source(gate_up, [1, walk.up_n, walk.up_k], True)
    w_down, tma_down = tile_source(down, [1, walk.down_n, walk.down_k], True)
    early = early_start(x.device)
    shared = {"HAS_MAP": expert_map is not None, "WIDEN": interpreting(), "PDL": early}
    with on(x.device):
        launch(
            _few_gate_up, (triton.cdiv(width, walk.up_n), slots),
            x, w_up, act, ids, emap, slots, hidden, width, top_k, experts, emap.numel(),
            *ids.stride(), *x.stride(), *gate_up.stride(), **shared,
            BN=walk.up_n, BK=walk.up_k, EVEN_K=hidden % walk.up_k == 0, TMA=tma_up, GELU=activation == "gelu_tanh",
            launch_pdl=early, num_warps=walk.up_warps, num_stages=walk.up_stages,
        )  # fmt: skip
        launch(
            _few_down, (triton.cdiv(hidden, walk.down_n), slots),
            act, w_down, y, ids, emap, slots, hidden, width, top_k, experts, emap.numel(),
            *ids.stride(), *down.stride(), **shared,
            BN=walk.down_n, BK=walk.down_k, EVEN_K=width % walk.down_k == 0, TMA=tma_down, launch_pdl=early,
            num_warps=walk.down_warps, num_stages=walk.down_stages,
        )  # fmt: skip
    return y
