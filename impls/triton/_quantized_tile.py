"""A tile of a product with weights as codes: how `_quantized_product` and `_slot_product` multiply.

Tiles are computed transposed, weights first: as first operand they may lie in registers, where their codes were made
numbers, and a few rows of activations still fill a wide product.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from moe_harness.impls.triton._codes import as_float, as_stored, half_power, quantised, row_scales, wide
from moe_harness.impls.triton._common import interpreting, narrow, product, tile_source
from moe_harness.impls.triton._half_bytes import half_bytes, scaled_half_bytes
from moe_harness.impls.triton._quantized_operands import (
    PACKED,
    RUN_OF,
    TYPES,
    Matrix,
    Rows,
    biased,
    hidden_values,
)
from moe_harness.impls.triton._tiles import row_tile, weight_tile
from moe_harness.impls.triton.configs import Tiling


@triton.jit
def _scales(
    scale, e, n0, N, k0, K, s_e, s_n, s_k, BN: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr,
    IN_TILE: tl.constexpr,
):  # fmt: skip
    """What is stored of the scales of weight rows n0.. at columns k0..k0+BK: [BN] of one run, or [BN, BK / 32]."""
    n = n0 + tl.arange(0, BN)
    row = n // 128 if FORMAT == "fp8_block" else n
    at = scale + e.to(tl.int64) * s_e + row.to(tl.int64) * s_n
    if IN_TILE:
        k = k0 // 32 + tl.arange(0, BK // 32)
        found = tl.load(at[:, None] + k[None, :] * s_k, mask=(n < N)[:, None] & (k < K // 32)[None, :], other=0)
    else:
        found = tl.load(at + (k0 // BK) * s_k, mask=(n < N) & (n * 0 + k0 < K), other=0)
    return found


@triton.jit
def _step(
    acc, first, second, row_scale, found, w, e, n0, N, k0, K, w_e, w_n, w_k,
    BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, FORMAT: tl.constexpr,
    PACKED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] and the product over columns k0..k0+BK of weight rows n0.. with rows `first` [BM, BK].

    PACKED: with their even columns `first` and their odd ones `second`.  `found`: the scales as stored.
    """
    SHARE: tl.constexpr = 2 if PACKED else 1
    tile = weight_tile(w, e, n0, k0 // SHARE, N, K // SHARE, w_e, w_n, w_k, BN, BK // SHARE, EVEN_K, TMA)
    SCALED: tl.constexpr = FORMAT != "plain" and not IN_TILE
    part = tl.zeros(acc.shape, tl.float32) if SCALED else acc
    if PACKED:
        if IN_TILE:  # a scale for each byte
            factors = tl.broadcast_to(half_power(found)[:, :, None], (BN, BK // 32, 16))
            low, high = scaled_half_bytes(tile, tl.reshape(factors, (BN, BK // 2)), TO, WIDEN)
        else:
            low, high = half_bytes(tile, FORMAT, TO, WIDEN)
        part = product(low, first.T, part, WIDEN)
        part = product(high, second.T, part, WIDEN)
    elif ROWS == "kept":
        part = product(as_float(tile, FORMAT, TO, WIDEN), first.T, part, WIDEN)
    else:
        part = product(wide(tile, WIDEN), first.T, part, WIDEN)
    if SCALED:
        factor = half_power(found) if FORMAT == "mxfp4" else found.to(tl.float32)
        part = acc + part * (factor[:, None] if ROWS == "kept" else factor[:, None] * row_scale[None, :])
    return part


@triton.jit
def product_tile(
    a, a_scale, w, scale, bias, out, out_scale, e, from_row, known, to_row, live, n0, N, K, a_row, a_col, as_row,
    w_e, w_n, w_k, s_e, s_n, s_k, b_e, b_n, o_row, os_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
    CODES: tl.constexpr, BIAS: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out at rows to_row [BM] where `live`, BN columns from n0 on, of expert e and rows from_row [R] of a where known.

    R is BM, or 1 where one row stands in all columns of the product.  Scales, and a row alone, which is too narrow for
    the loads that the compiler starts stages ahead, are asked for a step before they are needed: nothing else in the
    loop would wait for memory.
    """
    GATED: tl.constexpr = ACT != ""
    HAS: tl.constexpr = FORMAT != "plain"
    R: tl.constexpr = from_row.shape[0]
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    found, found_up = 0, 0
    if HAS:
        found = _scales(scale, e, n0, N, 0, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
        if GATED:
            found_up = _scales(scale, e, n0 + N, 2 * N, 0, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
    by = row_scales(a_scale, from_row, known, 0, K, as_row, BK, ROWS)
    coming = row_tile(a, from_row, known, 0, K, a_row, a_col, BK, False) if R < BM else 0
    for k0 in tl.range(0, K, BK):
        by_now, now, now_up = by, found, found_up
        by = row_scales(a_scale, from_row, known, k0 + BK, K, as_row, BK, ROWS)
        if HAS:
            found = _scales(scale, e, n0, N, k0 + BK, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
            if GATED:
                found_up = _scales(scale, e, n0 + N, 2 * N, k0 + BK, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
        if R < BM:
            rows = coming
            coming = row_tile(a, from_row, known, k0 + BK, K, a_row, a_col, BK, False)
        else:
            rows = row_tile(a, from_row, known, k0, K, a_row, a_col, BK, EVEN_K)
        if ROWS == "quantised":
            rows, by_now = quantised(rows, 1, WIDEN)
        elif ROWS == "codes":
            rows = wide(rows, WIDEN)
        if R < BM:
            rows = tl.broadcast_to(rows, (BM, BK))
        second = rows
        if PACKED:
            rows, second = tl.split(tl.reshape(rows, (BM, BK // 2, 2)))
        acc = _step(
            acc, rows, second, by_now, now, w, e, n0, N, k0, K, w_e, w_n, w_k, BN, BK, EVEN_K, TMA, FORMAT, PACKED,
            IN_TILE, ROWS, TO, WIDEN,
        )  # fmt: skip
        if GATED:
            up = _step(
                up, rows, second, by_now, now_up, w, e, n0 + N, 2 * N, k0, K, w_e, w_n, w_k, BN, BK, EVEN_K, TMA,
                FORMAT, PACKED, IN_TILE, ROWS, TO, WIDEN,
            )  # fmt: skip
    n = n0 + tl.arange(0, BN)
    acc = biased(acc, bias, e, n, N, b_e, b_n, BIAS)
    if GATED:
        acc = hidden_values(acc, biased(up, bias, e, n + N, 2 * N, b_e, b_n, BIAS), ACT, TO)
    inside = (n < N)[:, None] & live[None, :]
    at = out + to_row[None, :].to(tl.int64) * o_row + n[:, None]
    if CODES:  # columns past the last one have scales of 0, so they count as 0 in the largest
        code, by_out = quantised(acc, 0, WIDEN)
        tl.store(at, as_stored(code, out.dtype.element_ty, WIDEN), mask=inside)
        tl.store(out_scale + to_row.to(tl.int64) * os_row + n0 // BN, by_out, mask=live)
    else:
        tl.store(at, narrow(acc, out.dtype.element_ty, WIDEN), mask=inside)


def constants_of(
    a: Rows, matrix: Matrix, tiling: Tiling, dtype: torch.dtype, activation: str, quantize: bool
) -> tuple[object, dict[str, Any]]:
    """The weights as `product_tile` reads them, and its constants but for CODES."""
    packed, depth = matrix.format in PACKED, a.values.shape[1]
    # fp16 has not the range of powers of two: there a step is one run, and its sum is scaled.
    in_tile = matrix.format == "mxfp4" and dtype != torch.float16
    step = tiling.k if in_tile or matrix.format == "plain" else RUN_OF.get(matrix.format, 128)
    source, tma = tile_source(matrix.codes, [1, tiling.n, step // 2 if packed else step], tiling.tma)
    return source, {
        "BM": tiling.m, "BN": tiling.n, "BK": step, "EVEN_K": depth % step == 0, "TMA": tma, "FORMAT": matrix.format,
        "PACKED": packed, "IN_TILE": in_tile,
        "ROWS": "codes" if a.scale is not None else "quantised" if quantize else "kept", "ACT": activation,
        "BIAS": matrix.bias is not None, "TO": TYPES[dtype], "WIDEN": interpreting(),
    }  # fmt: skip
