r"""The tiles of a grouped product: which tile a program works on, and how it reads weights.

    y[rows of expert e] = a[rows of expert e] @ weight[e].T

Expert e owns a run of rows; a tile is BM rows of one run times BN columns.  The number of tiles depends on the data, so
every program works it out from `counts` (one load and one cumulative sum over the experts), and the loop over tiles
stops where they end: no table, no host synchronisation, and a grid smaller than the number of tiles is persistent.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Weights(NamedTuple):
    """Weights [E, N, K] (of gate and up [E, 2 * N, K]): a pointer or a descriptor, N, and the strides of a pointer."""

    at: Any
    width: Any
    e: Any
    n: Any
    k: Any


class Run(NamedTuple):
    """The rows of one expert: `count` of them from `start` on; slots[row] is where a row came from."""

    slots: Any
    e: Any
    count: Any
    start: Any


class To(NamedTuple):
    """An output and the stride of its rows."""

    at: Any
    row: Any


@triton.jit
def row_tiles(rows, BM: tl.constexpr, EXTRA: tl.constexpr):
    """Row tiles of runs of `rows` rows: BM rows each, the last one up to EXTRA more."""
    return tl.where(rows > 0, tl.maximum((rows - EXTRA + BM - 1) // BM, 1), 0)


@triton.jit
def expert_runs(counts, stride, E, n_blocks, BLOCK_E: tl.constexpr, BM: tl.constexpr, EXTRA: tl.constexpr):
    """Per expert, int32 [BLOCK_E]: rows, and the number of tiles up to and including it."""
    e = tl.arange(0, BLOCK_E)
    rows = tl.load(counts + e * stride, mask=e < E, other=0).to(tl.int32)
    return rows, tl.cumsum(row_tiles(rows, BM, EXTRA) * n_blocks, 0)


@triton.jit
def find_tile(tile, counts, stride, rows, ends, n_blocks, BM: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr):
    """Expert, its rows, its first row, and row and column block of `tile`.

    Inside an expert GROUP row tiles are walked before the next column block, so that programs running together share
    both the rows and the weights they read.
    """
    passed = ends <= tile
    e = tl.sum(passed.to(tl.int32), 0)
    count = tl.load(counts + e * stride).to(tl.int32)
    start = tl.sum(tl.where(passed, rows, 0), 0)
    local = tile - tl.max(tl.where(passed, ends, 0), 0)
    first = local // (GROUP * n_blocks) * GROUP
    width = tl.minimum(row_tiles(count, BM, EXTRA) - first, GROUP)
    inside = local - first * n_blocks
    return e, count, start, first + inside % width, inside // width


@triton.jit
def weight_tile(
    w, e, n0, k0, N, K, w_e, w_n, w_k, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr
):
    """Tile [BN, BK] of w[e] at (n0, k0), zero outside; `w` is a descriptor with TMA, else a pointer."""
    if TMA:
        tile = tl.reshape(w.load([e, n0, k0]), (BN, BK))
    else:
        n = n0 + tl.arange(0, BN)
        k = k0 + tl.arange(0, BK)
        at = w + e.to(tl.int64) * w_e + n[:, None].to(tl.int64) * w_n + k[None, :].to(tl.int64) * w_k
        mask = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & (k < K)[None, :]
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def row_tile(a, row, live, k0, K, a_row, a_col, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """Rows `row` [BM] of a at columns k0..k0+BK, zero where not `live` or past K."""
    k = k0 + tl.arange(0, BK)
    at = a + row[:, None].to(tl.int64) * a_row + k[None, :].to(tl.int64) * a_col
    mask = live[:, None] if EVEN_K else live[:, None] & (k < K)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def pair_tile(
    w, e, n0, k0, N, K, w_e, w_n, w_k, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr
):
    """Tile [2 * BN, BK] of w[e], [2 * N, K]: 8 rows from n0 on, the 8 that lie N further, the next 8, and so on.

    With TMA `w` is a descriptor of [E, N / 8, 2, 8, K].  A thread that holds a column of the product with one half
    also holds the one with the other half.
    """
    if TMA:
        tile = tl.reshape(w.load([e, n0 // 8, 0, 0, k0]), (2 * BN, BK))
    else:
        i = tl.arange(0, 2 * BN)
        n = n0 + i // 16 * 8 + i % 8
        k = k0 + tl.arange(0, BK)
        row = (n + i // 8 % 2 * N).to(tl.int64)
        at = w + e.to(tl.int64) * w_e + row[:, None] * w_n + k[None, :].to(tl.int64) * w_k
        mask = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & (k < K)[None, :]
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def unpair(y, BM: tl.constexpr, BN: tl.constexpr):
    """The halves [BM, BN] of a product [BM, 2 * BN] with a `pair_tile`."""
    first, second = tl.split(tl.permute(tl.reshape(y, (BM, BN // 8, 2, 8)), (0, 1, 3, 2)))
    return tl.reshape(first, (BM, BN)), tl.reshape(second, (BM, BN))
