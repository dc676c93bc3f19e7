r"""First product of the experts, with the gather before it and the activation behind it.

    [g; u] = gate_up[e] @ x[token of slot]          act = activation(g) * u          for every routed slot

Each program sums up BN gate rows and the BN up rows that belong to them, so the [S, 2I] intermediate never exists.  Row
tiles of 64 and more take both in one product, from a weight tile in which 8 gate rows and 8 up rows alternate.  Rounded
to the input dtype: act alone.  With many rows on a Hopper GPU `_gate_up_hopper` does the same with a copying warpgroup.
"""

from typing import Any, NamedTuple

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
from moe_harness.impls.triton._tiles import (
    Run,
    To,
    Weights,
    expert_runs,
    find_tile,
    pair_tile,
    row_tile,
    row_tiles,
    unpair,
    weight_tile,
)
from moe_harness.impls.triton.configs import Tiling, grid_size

__all__ = ["gate_up"]


class Tokens(NamedTuple):
    """x [T, H]: where it is, slots of each row, H, and its strides."""

    at: Any
    per_token: Any
    depth: Any
    row: Any
    col: Any


class How(NamedTuple):
    """The tile beside its height, and what is compiled in."""

    BN: tl.constexpr
    BK: tl.constexpr
    EVEN_K: tl.constexpr
    TMA: tl.constexpr
    SWAP: tl.constexpr
    PAIR: tl.constexpr
    GELU: tl.constexpr
    WIDEN: tl.constexpr


@triton.jit
def _rows(run, top_k, first, BM: tl.constexpr):
    """Rows first..first+BM of a run: which ones are inside, and their tokens."""
    row = first + tl.arange(0, BM)
    live = row < run.count
    return row, live, tl.load(run.slots + run.start + row, mask=live, other=0) // top_k


@triton.jit
def _sums(BM: tl.constexpr, how):
    """Zeros for the sums of the gate and the up rows; with PAIR the first one serves both."""
    shape: tl.constexpr = (how.BN, BM) if how.SWAP else (BM, 2 * how.BN if how.PAIR else how.BN)
    return tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)


@triton.jit
def _add(rows_x, w_g, w_u, g, u, how):
    """g and u after one step."""
    if how.SWAP:
        g = product(w_g, rows_x.T, g, how.WIDEN)
        u = product(w_u, rows_x.T, u, how.WIDEN)
    else:
        g = product(rows_x, w_g.T, g, how.WIDEN)
        if not how.PAIR:
            u = product(rows_x, w_u.T, u, how.WIDEN)
    return g, u


@triton.jit
def _write(act, g, u, run, row, live, n0, WIDTH, BM: tl.constexpr, how):
    """The activation into its BM rows and BN columns of act."""
    if how.PAIR:
        g, u = unpair(g, BM, how.BN)
    dtype: tl.constexpr = act.at.dtype.element_ty
    out = narrow(gated(g, u, how.GELU, dtype), dtype, how.WIDEN)
    if how.SWAP:
        out = out.T
    col = n0 + tl.arange(0, how.BN)
    at = act.at + (run.start + row)[:, None].to(tl.int64) * act.row + col[None, :]
    tl.store(at, out, mask=live[:, None] & (col < WIDTH)[None, :])


@triton.jit
def _weights(w, e, n0, k0, H, how):
    """The tiles of the gate and of the up rows; with PAIR one that holds both, twice."""
    if how.PAIR:
        w_g = pair_tile(w.at, e, n0, k0, w.width, H, w.e, w.n, w.k, how.BN, how.BK, how.EVEN_K, how.TMA)
        w_u = w_g
    else:
        w_g = weight_tile(w.at, e, n0, k0, w.width, H, w.e, w.n, w.k, how.BN, how.BK, how.EVEN_K, how.TMA)
        w_u = weight_tile(w.at, e, n0 + w.width, k0, 2 * w.width, H, w.e, w.n, w.k, how.BN, how.BK, how.EVEN_K, how.TMA)
    return w_g, w_u


@triton.jit
def _some_rows(x, w, act, run, first, n0, BM: tl.constexpr, EXTRA: tl.constexpr, how):
    """act of BM + EXTRA rows of a run from its row `first` on, at BN columns from n0 on."""
    row, live, token = _rows(run, x.per_token, first, BM)
    g, u = _sums(BM, how)
    if EXTRA:
        row_2, live_2, token_2 = _rows(run, x.per_token, first + BM, EXTRA)
        g_2, u_2 = _sums(EXTRA, how)
    for k0 in tl.range(0, x.depth, how.BK):
        rows_x = row_tile(x.at, token, live, k0, x.depth, x.row, x.col, how.BK, how.EVEN_K)
        w_g, w_u = _weights(w, run.e, n0, k0, x.depth, how)
        g, u = _add(rows_x, w_g, w_u, g, u, how)
        if EXTRA:
            rows_2 = row_tile(x.at, token_2, live_2, k0, x.depth, x.row, x.col, how.BK, how.EVEN_K)
            g_2, u_2 = _add(rows_2, w_g, w_u, g_2, u_2, how)
    _write(act, g, u, run, row, live, n0, w.width, BM, how)
    if EXTRA:
        _write(act, g_2, u_2, run, row_2, live_2, n0, w.width, EXTRA, how)


@triton.jit
def _one_tile(x, w, act, run, first, n0, BM: tl.constexpr, EXTRA: tl.constexpr, TAIL: tl.constexpr, how):
    """The tile whose first row is `first`, in the height that its expert's rows ask for."""
    left = run.count - first
    if EXTRA > 0 and (left > BM) & (left <= BM + EXTRA):
        _some_rows(x, w, act, run, first, n0, BM, EXTRA, how)
    elif TAIL and left <= BM // 2:
        _some_rows(x, w, act, run, first, n0, BM // 2, 0, how)
    else:
        _some_rows(x, w, act, run, first, n0, BM, 0, how)


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
    rows_x, weights, to = Tokens(x, top_k, H, x_row, x_col), Weights(w, WIDTH, w_e, w_n, w_k), To(act, act_row)
    n_blocks = tl.cdiv(WIDTH, BN)
    if BY_EXPERT:
        e = tl.program_id(0) // n_blocks
        n0 = tl.program_id(0) % n_blocks * BN
        run = Run(slots, e, tl.load(counts + e), tl.load(counts + E + e))
        for m in range(row_tiles(run.count, BM, EXTRA)):
            _one_tile(
                rows_x, weights, to, run, m * BM, n0, BM, EXTRA, TAIL,
                How(BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN),
            )  # fmt: skip
    else:
        rows, ends = expert_runs(counts, 1, E, n_blocks, BLOCK_E, BM, EXTRA)
        for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0), flatten=FLAT):
            e, count, start, m, n = find_tile(tile, counts, 1, rows, ends, n_blocks, BM, EXTRA, GROUP)
            run = Run(slots, e, count, start)
            _one_tile(
                rows_x, weights, to, run, m * BM, n * BN, BM, EXTRA, TAIL,
                How(BN, BK, EVEN_K, TMA, SWAP, PAIR, GELU, WIDEN),
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
