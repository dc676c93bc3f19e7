r"""A product per expert over rows sorted by expert: the second product of the experts, and the grouped linear.

    y[to(s)] = weight[e] @ a[s] (+ bias[e])        e: the expert whose run row s falls into

`to(s)` is s, or slots[s] where the rows go back to the order of the slots.  With many of those on a Hopper GPU
`_linear_hopper` does the same with a copying warp.
"""

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
from moe_harness.impls.triton._tiles import expert_runs, find_tile, row_tile, weight_tile
from moe_harness.impls.triton.configs import Tiling, grid_size


@triton.jit
def _linear_tile(
    a, w, bias, y, slots, e, count, start, first, n0, K, N, a_row, a_col, w_e, w_n, w_k, b_e, b_n, y_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    TMA_A: tl.constexpr, SWAP: tl.constexpr, WIDEN: tl.constexpr, BIAS: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """y of BM rows of expert e from its row `first` on, at BN columns from n0 on."""
    row = first + tl.arange(0, BM)
    live = row < count
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    acc = tl.zeros(shape, tl.float32)
    for k0 in tl.range(0, K, BK):
        if TMA_A:  # rows of the next expert may come along; their results are never stored
            rows_a = a.load([start + first, k0])
        else:
            rows_a = row_tile(a, start + row, live, k0, K, a_row, a_col, BK, EVEN_K)
        w_tile = weight_tile(w, e, n0, k0, N, K, w_e, w_n, w_k, BN, BK, EVEN_K, TMA)
        acc = product(w_tile, rows_a.T, acc, WIDEN) if SWAP else product(rows_a, w_tile.T, acc, WIDEN)
    if SWAP:
        acc = acc.T
    col = n0 + tl.arange(0, BN)
    if BIAS:
        b = tl.load(bias + e.to(tl.int64) * b_e + col.to(tl.int64) * b_n, mask=col < N, other=0.0)
        acc += b[None, :].to(tl.float32)
    to = start + row
    if SCATTER:
        to = tl.load(slots + to, mask=live, other=0)
    at = y + to[:, None].to(tl.int64) * y_row + col[None, :]
    tl.store(at, narrow(acc, y.dtype.element_ty, WIDEN), mask=live[:, None] & (col < N)[None, :])


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
    if BY_EXPERT:
        # `counts` may be read before the previous kernel ends: that one has waited for the one that wrote them.
        e = tl.program_id(0) // n_blocks
        n0 = tl.program_id(0) % n_blocks * BN
        count, start = tl.load(counts + e), tl.load(counts + E + e)
        after_previous(PDL)
        let_next_start(PDL)
        for m in range(tl.cdiv(count, BM)):
            _linear_tile(
                a, w, bias, y, slots, e, count, start, m * BM, n0, K, N, a_row, a_col, w_e, w_n, w_k,
                b_e, b_n, y_row, BM, BN, BK, EVEN_K, TMA, TMA_A, SWAP, WIDEN, BIAS, SCATTER,
            )  # fmt: skip
    else:
        after_previous(PDL)
        let_next_start(PDL)
        rows, ends = expert_runs(counts, c_e, E, n_blocks, BLOCK_E, BM, 0)
        for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0), flatten=FLAT):
            e, count, start, m, n = find_tile(tile, counts, c_e, rows, ends, n_blocks, BM, 0, GROUP)
            if TAIL and count - m * BM <= BM // 2:
                _linear_tile(
                    a_half, w, bias, y, slots, e, count, start, m * BM, n * BN, K, N, a_row, a_col, w_e, w_n, w_k,
                    b_e, b_n, y_row, BM // 2, BN, BK, EVEN_K, TMA, TMA_A, SWAP, WIDEN, BIAS, SCATTER,
                )  # fmt: skip
            else:
                _linear_tile(
                    a, w, bias, y, slots, e, count, start, m * BM, n * BN, K, N, a_row, a_col, w_e, w_n, w_k,
                    b_e, b_n, y_row, BM, BN, BK, EVEN_K, TMA, TMA_A, SWAP, WIDEN, BIAS, SCATTER,
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
