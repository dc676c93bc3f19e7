r"""First product of the experts, with the gather before it and the activation behind it.

    [g; u] = gate_up[e] @ x[token of slot]          act = activation(g) * u          for every routed slot

Each program sums up BN gate rows and the BN up rows that belong to them, so the [S, 2I] intermediate never exists.  Row
tiles of 64 and more take both in one product, from a weight tile in which 8 gate rows and 8 up rows alternate.  Rounded
to the input dtype: act alone.  With many rows on a Hopper GPU `_gate_up_hopper` does the same with a copying warpgroup.
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
    on_hopper,
    product,
    tile_source,
)
from moe_harness.impls.triton._tiles import expert_runs, find_tile, pair_tile, row_tile, row_tiles, unpair, weight_tile
from moe_harness.impls.triton.configs import Tiling, grid_size

__all__ = ["gate_up"]


@triton.jit
def _rows(slots, start, first, count, top_k, BM: tl.constexpr):
    """Rows first..first+BM of a run: which ones are inside, and their tokens."""
    row = first + tl.arange(0, BM)
    live = row < count
    return row, live, tl.load(slots + start + row, mask=live, other=0) // top_k


@triton.jit
def _sums(BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr, PAIR: tl.constexpr):
    """Zeros for the sums of the gate and the up rows; with PAIR the first one serves both."""
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, 2 * BN if PAIR else BN)
    return tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)


@triton.jit
def _add(rows_x, w_g, w_u, g, u, SWAP: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr):
    """g and u after one step."""
    if SWAP:
        g = product(w_g, rows_x.T, g, WIDEN)
        u = product(w_u, rows_x.T, u, WIDEN)
    else:
        g = product(rows_x, w_g.T, g, WIDEN)
        if not PAIR:
            u = product(rows_x, w_u.T, u, WIDEN)
    return g, u


@triton.jit
def _write(
    act, g, u, start, row, live, n0, WIDTH, act_row,
    BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr, PAIR: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The activation into its BM rows and BN columns of act."""
    if PAIR:
        g, u = unpair(g, BM, BN)
    out = narrow(gated(g, u, GELU, act.dtype.element_ty), act.dtype.element_ty, WIDEN)
    if SWAP:
        out = out.T
    col = n0 + tl.arange(0, BN)
    at = act + (start + row)[:, None].to(tl.int64) * act_row + col[None, :]
    tl.store(at, out, mask=live[:, None] & (col < WIDTH)[None, :])


@triton.jit
def _some_rows(
    x, w, act, slots, e, count, start, first, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
    BM: tl.constexpr, EXTRA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    SWAP: tl.constexpr, PAIR: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """act of BM + EXTRA rows of expert e from its row `first` on, at BN columns from n0 on."""
    row, live, token = _rows(slots, start, first, count, top_k, BM)
    g, u = _sums(BM, BN, SWAP, PAIR)
    if EXTRA:
        row_2, live_2, token_2 = _rows(slots, start, first + BM, count, top_k, EXTRA)
        g_2, u_2 = _sums(EXTRA, BN, SWAP, PAIR)
    for k0 in tl.range(0, H, BK):
        rows_x = row_tile(x, token, live, k0, H, x_row, x_col, BK, EVEN_K)
        if PAIR:
            w_g = pair_tile(w, e, n0, k0, WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
            w_u = w_g
        else:
            w_g = weight_tile(w, e, n0, k0, WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
            w_u = weight_tile(w, e, n0 + WIDTH, k0, 2 * WIDTH, H, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
        g, u = _add(rows_x, w_g, w_u, g, u, SWAP, PAIR, WIDEN)
        if EXTRA:
            rows_2 = row_tile(x, token_2, live_2, k0, H, x_row, x_col, BK, EVEN_K)
            g_2, u_2 = _add(rows_2, w_g, w_u, g_2, u_2, SWAP, PAIR, WIDEN)
    _write(act, g, u, start, row, live, n0, WIDTH, act_row, BM, BN, SWAP, PAIR, GELU, WIDEN)
    if EXTRA:
        _write(act, g_2, u_2, start, row_2, live_2, n0, WIDTH, act_row, EXTRA, BN, SWAP, PAIR, GELU, WIDEN)


@triton.jit
def _one_tile(
    x, w, act, slots, e, count, start, first, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
    BM: tl.constexpr, EXTRA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    SWAP: tl.constexpr, PAIR: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The tile whose first row is `first`, in the height that its expert's rows ask for."""
    left = count - first
    if EXTRA > 0 and (left > BM) & (left <= BM + EXTRA):
        _some_rows(
            x, w, act, slots, e, count, start, first, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
            BM, EXTRA, BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN,
        )  # fmt: skip
    elif TAIL and left <= BM // 2:
        _some_rows(
            x, w, act, slots, e, count, start, first, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
            BM // 2, 0, BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN,
        )  # fmt: skip
    else:
        _some_rows(
            x, w, act, slots, e, count, start, first, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
            BM, 0, BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN,
        )  # fmt: skip


@triton.jit
def _gate_up(
    x, w, act, counts, slots, E, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
    BLOCK_E: tl.constexpr, BM: tl.constexpr, EXTRA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr, PAIR: tl.constexpr,
    GELU: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr, FLAT: tl.constexpr, TAIL: tl.constexpr,
    BY_EXPERT: tl.constexpr,
):  # fmt: skip
    """Tiles [BM slots, BN columns of act]; SWAP computes them transposed: few rows still fill a wide product."""
    after_previous(PDL)
    let_next_start(PDL)
    n_blocks = tl.cdiv(WIDTH, BN)
    if BY_EXPERT:
        e = tl.program_id(0) // n_blocks
        n0 = tl.program_id(0) % n_blocks * BN
        count, start = tl.load(counts + e), tl.load(counts + E + e)
        for m in range(row_tiles(count, BM, EXTRA)):
            _one_tile(
                x, w, act, slots, e, count, start, m * BM, n0, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k, act_row,
                BM, EXTRA, BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN, TAIL,
            )  # fmt: skip
    else:
        rows, ends = expert_runs(counts, 1, E, n_blocks, BLOCK_E, BM, EXTRA)
        for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0), flatten=FLAT):
            e, count, start, m, n = find_tile(tile, counts, 1, rows, ends, n_blocks, BM, EXTRA, GROUP)
            _one_tile(
                x, w, act, slots, e, count, start, m * BM, n * BN, H, WIDTH, top_k, x_row, x_col, w_e, w_n, w_k,
                act_row, BM, EXTRA, BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN, TAIL,
            )  # fmt: skip


def pair_source(weight: Tensor, n: int, k: int, wanted: bool) -> tuple[object, bool]:
    """`tile_source` of weight [E, 2I, H] for pairs of 8 gate and 8 up rows: as [E, I / 8, 2, 8, H]."""
    experts, rows, depth = weight.shape
    if rows % 16:
        return weight, False
    per_expert, per_row, per_column = weight.stride()
    pairs = weight.as_strided(
        (experts, rows // 16, 2, 8, depth), (per_expert, 8 * per_row, rows // 2 * per_row, per_row, per_column)
    )
    return tile_source(pairs, [1, n // 8, 2, 8, k], wanted)


def gate_up(
    x: Tensor, weight: Tensor, counts: Tensor, slots: Tensor, top_k: int, activation: str, tiling: Tiling, expected: int
) -> Tensor:
    """Activated rows [S, I] in the order of `slots`, in the dtype of x [T, H], for weight [E, 2I, H].

    `expected` is the number of rows the grid is sized for; more are handled.  Rows past sum(counts) are not written.
    Rows start 16-byte aligned, so that the second product may read tiles of them through the copy engine.
    """
    num_experts, width = weight.shape[0], weight.shape[1] // 2
    act = empty(x, len(slots), triton.cdiv(width, 8) * 8)[:, :width]
    if tiling.copier and on_hopper(x.device):
        from moe_harness.impls.triton._gate_up_hopper import fits, gate_up_hopper

        if fits(x, weight):
            gate_up_hopper(x, weight, act, counts, slots, top_k, activation == "gelu_tanh", tiling.group)
            return act
    # One wide product for both halves: 4 % faster at 16384 tokens than two.  As first operand (`swap`) such a tile
    # would go through registers, and below 64 rows there is no wide product.
    pair = tiling.m >= 64 and not tiling.swap
    if pair:
        source, tma = pair_source(weight, tiling.n, tiling.k, tiling.tma)
    else:
        source, tma = tile_source(weight, [1, tiling.n, tiling.k], tiling.tma)
    early = early_start(x.device)
    with on(x.device):
        launch(
            _gate_up, (grid_size(tiling, expected, num_experts, width, x.device),),
            x, source, act, counts, slots, num_experts, x.shape[1], width, top_k,
            *x.stride(), *weight.stride(), act.stride(0),
            BLOCK_E=triton.next_power_of_2(num_experts), BM=tiling.m, EXTRA=tiling.extra, BN=tiling.n, BK=tiling.k,
            GROUP=tiling.group, EVEN_K=x.shape[1] % tiling.k == 0, TMA=tma, SWAP=tiling.swap, PAIR=pair,
            GELU=activation == "gelu_tanh", WIDEN=interpreting(), PDL=early, FLAT=tiling.flat, TAIL=tiling.tail,
            BY_EXPERT=tiling.by_expert,
            launch_pdl=early, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return act
