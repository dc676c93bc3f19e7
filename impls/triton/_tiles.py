r"""The tiles of a grouped product: which tile a program works on, and how it reads weights.

    y[rows of expert e] = a[rows of expert e] @ weight[e].T

Expert e owns a run of rows; a tile is BM rows of one run times BN columns.  The number of tiles depends on the data, so
every program works it out from `counts` (one load and one cumulative sum over the experts), and the loop over tiles
stops where they end: no table, no host synchronisation, and a grid smaller than the number of tiles is persistent.
"""

import triton
import triton.language as tl


@triton.jit
def expert_runs(counts, stride, E, n_blocks, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """Per expert, int32 [BLOCK_E]: rows, first row, row tiles, and the number of tiles up to and including it."""
    e = tl.arange(0, BLOCK_E)
    rows = tl.load(counts + e * stride, mask=e < E, other=0).to(tl.int32)
    row_tiles = (rows + BM - 1) // BM
    return rows, tl.cumsum(rows, 0) - rows, row_tiles, tl.cumsum(row_tiles, 0) * n_blocks


@triton.jit
def pick(values, index, BLOCK_E: tl.constexpr):
    """values[index] of a vector in registers."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_E) == index, values, 0), 0)


@triton.jit
def find_tile(tile, rows, starts, row_tiles, ends, n_blocks, BLOCK_E: tl.constexpr, GROUP: tl.constexpr):
    """Expert, its rows, its first row, and row and column block of `tile`.

    Inside an expert GROUP row tiles are walked before the next column block, so that programs running together share
    both the rows and the weights they read.
    """
    e = tl.sum((ends <= tile).to(tl.int32), 0)
    count, start, m_blocks = pick(rows, e, BLOCK_E), pick(starts, e, BLOCK_E), pick(row_tiles, e, BLOCK_E)
    local = tile - (pick(ends, e, BLOCK_E) - m_blocks * n_blocks)
    first = local // (GROUP * n_blocks) * GROUP
    width = tl.minimum(m_blocks - first, GROUP)
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
