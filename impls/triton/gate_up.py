r"""First product of the experts, with the gather before it and the activation behind it.

    [g; u] = gate_up[e] @ x[token of slot]          act = activation(g) * u          for every routed slot

Each program holds one accumulator for BN gate rows and one for the BN up rows that belong to them, so the [S, 2I]
intermediate never exists.  Rounded to the input dtype: act alone.
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
    narrow,
    on,
    product,
    tile_source,
)
from impls.triton._tiles import expert_runs, find_tile, row_tile, weight_tile
from impls.triton.configs import Tiling, grid_size

__all__ = ["gate_up"]


@triton.jit
def _gate_up_tile(
    x, w, act, slots, e, count, start, first, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    SWAP: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """act of BM rows of expert e from its row `first` on, at BN columns from n0 on."""
    row = first + tl.arange(0, BM)
    live = row < count
    token = tl.load(slots + start + row, mask=live, other=0) // top_k
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    g = tl.zeros(shape, tl.float32)
    u = tl.zeros(shape, tl.float32)
    for k0 in tl.range(0, H, BK):
        rows_x = row_tile(x, token, live, k0, H, x_row, x_col, BK, EVEN_K)
        w_g = weight_tile(w, e, n0, k0, WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
        w_u = weight_tile(w, e, n0 + WIDTH, k0, 2 * WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
        if SWAP:
            g = product(w_g, rows_x.T, g, WIDEN)
            u = product(w_u, rows_x.T, u, WIDEN)
        else:
            g = product(rows_x, w_g.T, g, WIDEN)
            u = product(rows_x, w_u.T, u, WIDEN)
    out = narrow(gated(g, u, GELU), act.dtype.element_ty, WIDEN)
    if SWAP:
        out = out.T
    col = n0 + tl.arange(0, BN)
    at = act + (start + row)[:, None].to(tl.int64) * act_row + col[None, :]
    tl.store(at, out, mask=live[:, None] & (col < WIDTH)[None, :])


@triton.jit
def _gate_up(
    x, w, act, counts, slots, E, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
    BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr, FLAT: tl.constexpr, TAIL: tl.constexpr, BY_EXPERT: tl.constexpr,
):  # fmt: skip
    """Tiles [BM slots, BN columns of act]; SWAP computes them transposed: few rows still fill a wide product."""
    after_previous(PDL)
    let_next_start(PDL)
    n_blocks = tl.cdiv(WIDTH, BN)
    if BY_EXPERT:
        e = tl.program_id(0) // n_blocks
        count, start = tl.load(counts + e), tl.load(counts + E + e)
        for m in range(tl.cdiv(count, BM)):
            _gate_up_tile(
                x, w, act, slots, e, count, start, m * BM, tl.program_id(0) % n_blocks * BN, H, WIDTH, top_k, x_row,
                x_col, w_e, w_n, w_k, act_row, BM, BN, BK, EVEN_K, TMA, SWAP, GELU, WIDEN,
            )  # fmt: skip
    else:
        rows, starts, row_tiles, ends = expert_runs(counts, 1, E, n_blocks, BLOCK_E, BM)
        for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0), flatten=FLAT):
            e, count, start, m, n = find_tile(tile, rows, starts, row_tiles, ends, n_blocks, BLOCK_E, GROUP)
            if TAIL and count - m * BM <= BM // 2:
                _gate_up_tile(
                    x, w, act, slots, e, count, start, m * BM, n * BN, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k,
                    act_row, BM // 2, BN, BK, EVEN_K, TMA, SWAP, GELU, WIDEN,
                )  # fmt: skip
            else:
                _gate_up_tile(
                    x, w, act, slots, e, count, start, m * BM, n * BN, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k,
                    act_row, BM, BN, BK, EVEN_K, TMA, SWAP, GELU, WIDEN,
                )  # fmt: skip


def gate_up(
    x: Tensor, weight: Tensor, counts: Tensor, slots: Tensor, top_k: int, activation: str, tiling: Tiling, expected: int
) -> Tensor:
    """Activated rows [S, I] in the order of `slots`, in the dtype of x [T, H], for weight [E, 2I, H].

    `expected` is the number of rows the grid is sized for; more are handled.  Rows past sum(counts) are not written.
    Rows start 16-byte aligned, so that the second product may read tiles of them through the copy engine.
    """
    num_experts, width = weight.shape[0], weight.shape[1] // 2
    act = x.new_empty(len(slots), triton.cdiv(width, 8) * 8)[:, :width]
    source, tma = tile_source(weight, [1, tiling.n, tiling.k], tiling.tma)
    early = early_start(x.device)
    with on(x.device):
        _gate_up[(grid_size(tiling, expected, num_experts, width, x.device),)](
            x, source, act, counts, slots, num_experts, x.shape[1], width, top_k,
            *x.stride(), *weight.stride(), act.stride(0),
            BLOCK_E=triton.next_power_of_2(num_experts), BM=tiling.m, BN=tiling.n, BK=tiling.k, GROUP=tiling.group,
            EVEN_K=x.shape[1] % tiling.k == 0, TMA=tma, SWAP=tiling.swap, GELU=activation == "gelu_tanh",
            WIDEN=interpreting(), PDL=early, FLAT=tiling.flat, TAIL=tiling.tail, BY_EXPERT=tiling.by_expert,
            launch_pdl=early, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return act
