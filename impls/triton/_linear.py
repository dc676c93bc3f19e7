r"""A product per expert over rows sorted by expert: the second product of the experts, and the grouped linear.

    y[to(s)] = weight[e] @ a[s] (+ bias[e])        e: the expert whose run row s falls into

`to(s)` is s, or slots[s] where the rows go back to the order of the slots.  With many of those on a Hopper GPU
`_linear_hopper` does the same with a copying warp.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    interpreting,
    let_next_start,
    narrow,
    on,
    on_hopper,
    product,
    tile_source,
)
from moe_harness.impls.triton._tiles import Run, To, Weights, expert_runs, find_tile, row_tile, weight_tile
from moe_harness.impls.triton.configs import Tiling, grid_size


class Rows(NamedTuple):
    """a [S, K]: a pointer or a descriptor, K, and the strides of a pointer."""

    at: Any
    depth: Any
    row: Any
    col: Any


class Bias(NamedTuple):
    """bias [E, N] and its strides."""

    at: Any
    e: Any
    n: Any


class How(NamedTuple):
    """The tile beside its height, and what is compiled in."""

    BN: tl.constexpr
    BK: tl.constexpr
    EVEN_K: tl.constexpr
    TMA: tl.constexpr
    TMA_A: tl.constexpr
    SWAP: tl.constexpr
    WIDEN: tl.constexpr
    BIAS: tl.constexpr
    SCATTER: tl.constexpr


@triton.jit
def _linear_tile(a, w, bias, y, run, first, n0, BM: tl.constexpr, how):
    """y of BM rows of a run from its row `first` on, at BN columns from n0 on."""
    row = first + tl.arange(0, BM)
    live = row < run.count
    shape: tl.constexpr = (how.BN, BM) if how.SWAP else (BM, how.BN)
    acc = tl.zeros(shape, tl.float32)
    for k0 in tl.range(0, a.depth, how.BK):
        if how.TMA_A:  # rows of the next expert may come along; their results are never stored
            rows_a = a.at.load([run.start + first, k0])
        else:
            rows_a = row_tile(a.at, run.start + row, live, k0, a.depth, a.row, a.col, how.BK, how.EVEN_K)
        w_tile = weight_tile(w.at, run.e, n0, k0, w.width, a.depth, w.e, w.n, w.k, how.BN, how.BK, how.EVEN_K, how.TMA)
        acc = product(w_tile, rows_a.T, acc, how.WIDEN) if how.SWAP else product(rows_a, w_tile.T, acc, how.WIDEN)
    if how.SWAP:
        acc = acc.T
    col = n0 + tl.arange(0, how.BN)
    if how.BIAS:
        b = tl.load(bias.at + run.e.to(tl.int64) * bias.e + col.to(tl.int64) * bias.n, mask=col < w.width, other=0.0)
        acc += b[None, :].to(tl.float32)
    to = run.start + row
    if how.SCATTER:
        to = tl.load(run.slots + to, mask=live, other=0)
    at = y.at + to[:, None].to(tl.int64) * y.row + col[None, :]
    tl.store(at, narrow(acc, y.at.dtype.element_ty, how.WIDEN), mask=live[:, None] & (col < w.width)[None, :])


@triton.jit
def _linear(
    a, a_half, w, bias, y, counts, slots, E, K, N, a_row, a_col, w_e, w_n, w_k, b_e, b_n, c_e, y_row,
    BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, TMA_A: tl.constexpr, SWAP: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr, FLAT: tl.constexpr, TAIL: tl.constexpr, BY_EXPERT: tl.constexpr, BIAS: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """Tiles [BM rows, BN columns] of y; `a_half` is `a` with a descriptor for half the rows."""
    n_blocks = tl.cdiv(N, BN)
    rows_a, half = Rows(a, K, a_row, a_col), Rows(a_half, K, a_row, a_col)
    weights, offset, to = Weights(w, N, w_e, w_n, w_k), Bias(bias, b_e, b_n), To(y, y_row)
    if BY_EXPERT:
        # `counts` may be read before the previous kernel ends: that one has waited for the one that wrote them.
        e = tl.program_id(0) // n_blocks
        n0 = tl.program_id(0) % n_blocks * BN
        run = Run(slots, e, tl.load(counts + e), tl.load(counts + E + e))
        after_previous(PDL)
        let_next_start(PDL)
        for m in range(tl.cdiv(run.count, BM)):
            _linear_tile(
                rows_a, weights, offset, to, run, m * BM, n0, BM,
                How(BN, BK, EVEN_K, TMA, TMA_A, SWAP, WIDEN, BIAS, SCATTER),
            )  # fmt: skip
    else:
        after_previous(PDL)
        let_next_start(PDL)
        rows, ends = expert_runs(counts, c_e, E, n_blocks, BLOCK_E, BM, 0)
        for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0), flatten=FLAT):
            e, count, start, m, n = find_tile(tile, counts, c_e, rows, ends, n_blocks, BM, 0, GROUP)
            run = Run(slots, e, count, start)
            if TAIL and count - m * BM <= BM // 2:
                _linear_tile(
                    half, weights, offset, to, run, m * BM, n * BN, BM // 2,
                    How(BN, BK, EVEN_K, TMA, TMA_A, SWAP, WIDEN, BIAS, SCATTER),
                )  # fmt: skip
            else:
                _linear_tile(
                    rows_a, weights, offset, to, run, m * BM, n * BN, BM,
                    How(BN, BK, EVEN_K, TMA, TMA_A, SWAP, WIDEN, BIAS, SCATTER),
                )  # fmt: skip


def linear(
    a: Tensor,
    weight: Tensor,
    counts: Tensor,
    tiling: Tiling,
    expected: int,
    *,
    slots: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y [S, N] in the dtype of a [S, K], for weight [E, N, K] and int counts [E] (of `align` where
    slots are given); row s goes to slots[s] where given.

    `expected` is the number of rows the grid is sized for; more are handled.  Rows past sum(counts) are not written.
    """
    num_experts, columns = weight.shape[0], weight.shape[1]
    y = empty(a, a.shape[0], columns)
    if tiling.copier and slots is not None and bias is None and on_hopper(a.device):
        from moe_harness.impls.triton._hopper import suits
        from moe_harness.impls.triton._linear_hopper import linear_hopper

        if suits(a, weight):
            linear_hopper(a, weight, y, counts, slots, tiling.group)
            return y
    source, tma = tile_source(weight, [1, tiling.n, tiling.k], tiling.tma)
    a_source, tma_a = tile_source(a, [tiling.m, tiling.k], tiling.tma)
    a_half = tile_source(a, [tiling.m // 2, tiling.k], tiling.tma)[0] if tiling.tail else a_source
    bias_strides = (0, 0) if bias is None else bias.stride()
    early = slots is not None and early_start(a.device)
    with on(a.device):
        launch(
            _linear, (grid_size(tiling, expected, num_experts, columns, a.device, slots is not None),),
            a_source, a_half, source, a if bias is None else bias, y, counts, counts if slots is None else slots,
            num_experts, a.shape[1], columns,
            *a.stride(), *weight.stride(), *bias_strides, counts.stride(-1), y.stride(0),
            BLOCK_E=triton.next_power_of_2(num_experts), BM=tiling.m, BN=tiling.n, BK=tiling.k, GROUP=tiling.group,
            EVEN_K=a.shape[1] % tiling.k == 0, TMA=tma, TMA_A=tma_a, SWAP=tiling.swap, WIDEN=interpreting(),
            PDL=early, FLAT=tiling.flat, TAIL=tiling.tail, BY_EXPERT=tiling.by_expert and slots is not None,
            launch_pdl=early, BIAS=bias is not None, SCATTER=slots is not None,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return y
