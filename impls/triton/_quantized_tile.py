"""A tile of a product with weights as codes: how `_quantized_product` and `_slot_product` multiply.

Tiles are computed transposed, weights first: as first operand they may lie in registers, where their codes were made
numbers, and a few rows of activations still fill a wide product.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.triton._codes import as_float, as_stored, half_power, quantised, row_scales, wide
from moe_harness.impls.triton._common import interpreting, narrow, product, tile_source
from moe_harness.impls.triton._half_bytes import numbers, row_order, word_tile, woven_places, woven_tile
from moe_harness.impls.triton._quantized_operands import (
    PACKED,
    RUN_OF,
    TYPES,
    Matrix,
    Rows,
    biased,
    columns_of,
    hidden_values,
)
from moe_harness.impls.triton._tiles import row_tile, weight_tile
from moe_harness.impls.triton.configs import Tiling
from moe_harness.impls.triton.gate_up import pair_source

PAIRED_FROM = 64  # rows of a tile from which two sums of their own leave a thread too few registers


@triton.jit
def _scales(scale, e, row, inside, k0, K, s_e, s_n, s_k, BK: tl.constexpr, FORMAT: tl.constexpr, IN_TILE: tl.constexpr):
    """What is stored of the scales of weight rows `row` [R] at columns k0..k0+BK: [R] of one run, or [R, BK / 32]."""
    row = row // 128 if FORMAT == "fp8_block" else row
    at = scale + e.to(tl.int64) * s_e + row.to(tl.int64) * s_n
    if IN_TILE:
        k = k0 // 32 + tl.arange(0, BK // 32)
        found = tl.load(at[:, None] + k[None, :] * s_k, mask=inside[:, None] & (k < K // 32)[None, :], other=0)
    else:
        found = tl.load(at + (k0 // BK) * s_k, mask=inside & (row * 0 + k0 < K), other=0)
    return found


@triton.jit
def _part(
    acc, rows, found, w, e, n0, N, row, inside, k0, K, w_e, w_n, w_k,
    BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    WORDS: tl.constexpr, PAIRED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr, TO: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The product over columns k0..k0+BK of weight rows `row` with rows [BM, BK]: of codes alone, or added to acc.

    PACKED: rows [BM, BK] in the order of `row_order`.  `found`: the scales as stored.
    """
    R: tl.constexpr = row.shape[0]
    part = tl.zeros(acc.shape, tl.float32) if FORMAT != "plain" and not IN_TILE else acc
    if PACKED:
        word = word_tile(w, e, n0, row, inside, k0, K, w_e, w_n, w_k, BK, TMA, WORDS, PAIRED)
        factor = word
        if IN_TILE:  # a scale for four words
            factor = tl.reshape(tl.broadcast_to(half_power(found)[:, :, None], (R, BK // 32, 4)), (R, BK // 8))
        tile = numbers(word, factor, FORMAT, IN_TILE, TO, WIDEN)
    else:
        tile = weight_tile(w, e, n0, k0, N, K, w_e, w_n, w_k, R, BK, EVEN_K, TMA)
        tile = as_float(tile, FORMAT, TO, WIDEN) if ROWS == "kept" else wide(tile, WIDEN)
    return product(tile, rows.T, part, WIDEN)


@triton.jit
def _added(acc, part, row_scale, found, FORMAT: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr):
    """acc and a `_part` of codes times its scales."""
    if FORMAT != "plain" and not IN_TILE:
        factor = half_power(found) if FORMAT == "mxfp4" else found.to(tl.float32)
        part = acc + part * (factor[:, None] if ROWS == "kept" else factor[:, None] * row_scale[None, :])
    return part


@triton.jit
def _halves(acc, BN: tl.constexpr, BM: tl.constexpr):
    """Gate and up [BN, BM] of paired rows [2 * BN, BM]: a thread of the product holds rows 8 apart."""
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 8, 2, 8, BM)), (0, 2, 3, 1)))
    return tl.reshape(gate, (BN, BM)), tl.reshape(up, (BN, BM))


@triton.jit
def product_tile(
    a, a_scale, w, scale, bias, out, out_scale, e, from_row, known, to_row, live, n0, N, K, a_row, a_col, as_row,
    w_e, w_n, w_k, s_e, s_n, s_k, b_e, b_n, o_row, os_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr, PAIRED: tl.constexpr, IN_TILE: tl.constexpr,
    ROWS: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr, BIAS: tl.constexpr, WOVEN: tl.constexpr,
    TO: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out at rows to_row [BM] where `live`, BN columns from n0 on, of expert e and rows from_row [R] of a where known.

    R is BM, or 1 where one row stands in all columns of the product.  PAIRED: gate and up rows are one tile of the
    weights, 8 of each in turn, so that one product gives both.  Scales, and a row alone, which is too narrow for the
    loads that the compiler starts stages ahead, are asked for a step before they are needed: nothing else in the loop
    would wait for memory.
    """
    GATED: tl.constexpr = ACT != ""
    TWO: tl.constexpr = GATED and not PAIRED
    HAS: tl.constexpr = FORMAT != "plain"
    R: tl.constexpr = from_row.shape[0]
    HEIGHT: tl.constexpr = 2 * BN if PAIRED else BN
    acc = tl.zeros((HEIGHT, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    n = n0 + tl.arange(0, BN)
    at = tl.arange(0, HEIGHT)
    column = n0 + (at // 16 * 8 + at % 8 if PAIRED else at)
    inside_w = column < N
    row_w = column + at // 8 % 2 * N if PAIRED else column
    found, found_up = 0, 0
    if HAS:
        found = _scales(scale, e, row_w, inside_w, 0, K, s_e, s_n, s_k, BK, FORMAT, IN_TILE)
        if TWO:
            found_up = _scales(scale, e, row_w + N, inside_w, 0, K, s_e, s_n, s_k, BK, FORMAT, IN_TILE)
    by = row_scales(a_scale, from_row, known, 0, K, as_row, BK, ROWS)
    coming = row_tile(a, from_row, known, 0, K, a_row, a_col, BK, False) if R < BM else 0
    for k0 in tl.range(0, K, BK):
        by_now, now, now_up = by, found, found_up
        by = row_scales(a_scale, from_row, known, k0 + BK, K, as_row, BK, ROWS)
        if HAS:
            found = _scales(scale, e, row_w, inside_w, k0 + BK, K, s_e, s_n, s_k, BK, FORMAT, IN_TILE)
            if TWO:
                found_up = _scales(scale, e, row_w + N, inside_w, k0 + BK, K, s_e, s_n, s_k, BK, FORMAT, IN_TILE)
        if R < BM:
            rows = coming
            coming = row_tile(a, from_row, known, k0 + BK, K, a_row, a_col, BK, False)
        elif WOVEN:
            rows = row_tile(a, from_row, known, k0, K, a_row, a_col, BK, True)
        else:
            rows = row_tile(a, from_row, known, k0, K, a_row, a_col, BK, EVEN_K)
        if ROWS == "quantised":
            rows, by_now = quantised(rows, 1, WIDEN)
        elif ROWS == "codes":
            rows = wide(rows, WIDEN)
        if PACKED and not WOVEN:
            rows = row_order(rows)
        if R < BM:
            rows = tl.broadcast_to(rows, (BM, BK))
        part = _part(
            acc, rows, now, w, e, n0, N, row_w, inside_w, k0, K, w_e, w_n, w_k, BK, EVEN_K, TMA, FORMAT, PACKED,
            WORDS, PAIRED, IN_TILE, ROWS, TO, WIDEN,
        )  # fmt: skip
        acc = _added(acc, part, by_now, now, FORMAT, IN_TILE, ROWS)
        if TWO:
            part = _part(
                up, rows, now_up, w, e, n0 + N, 2 * N, row_w + N, inside_w, k0, K, w_e, w_n, w_k, BK, EVEN_K, TMA,
                FORMAT, PACKED, WORDS, PAIRED, IN_TILE, ROWS, TO, WIDEN,
            )  # fmt: skip
            up = _added(up, part, by_now, now_up, FORMAT, IN_TILE, ROWS)
    if PAIRED:
        acc, up = _halves(acc, BN, BM)
    acc = biased(acc, bias, e, n, N, b_e, b_n, BIAS)
    if GATED:
        acc = hidden_values(acc, biased(up, bias, e, n + N, 2 * N, b_e, b_n, BIAS), ACT, TO)
    inside = (n < N)[:, None] & live[None, :]
    to = out + to_row[None, :].to(tl.int64) * o_row
    if CODES:  # columns past the last one have scales of 0, so they count as 0 in the largest
        code, by_out = quantised(acc, 0, WIDEN)
        tl.store(to + n[:, None], as_stored(code, out.dtype.element_ty, WIDEN), mask=inside)
        tl.store(out_scale + to_row.to(tl.int64) * os_row + n0 // BN, by_out, mask=live)
    elif WOVEN and GATED:  # with zeros up to a whole run of columns
        y = woven_tile(narrow(tl.where((n < N)[:, None], acc, 0.0), out.dtype.element_ty, WIDEN))
        tl.store(to + woven_places(n0, BN)[:, None], y, mask=live[None, :])
        if n0 + BN >= N and (n0 + BN) % 128 != 0:
            tl.store(to + woven_places(n0 + BN, BN)[:, None], tl.zeros_like(y), mask=live[None, :])
    else:
        tl.store(to + n[:, None], narrow(acc, out.dtype.element_ty, WIDEN), mask=inside)


def limit(tiling: Tiling) -> dict[str, int]:
    """The registers that a launch is held to, as Triton takes them."""
    return {"maxnreg": tiling.registers} if tiling.registers else {}


def as_words(codes: Tensor) -> Tensor:
    """Bytes [E, N, B] as words of 32 bits [E, N, B / 4] where they are whole in memory, else as they are."""
    sizes = (codes.data_ptr(), codes.shape[2], *codes.stride()[:2])  # a dimension of size 1 may have any stride
    return codes.view(torch.int32) if codes.stride(-1) == 1 and all(n % 4 == 0 for n in sizes) else codes


def constants_of(
    a: Rows, matrix: Matrix, tiling: Tiling, dtype: torch.dtype, activation: str, quantize: bool
) -> tuple[tuple[object, tuple[int, ...]], dict[str, Any]]:
    """The weights as `product_tile` reads them with their strides, and its constants but for CODES."""
    packed = matrix.format in PACKED
    depth = columns_of(matrix)
    # fp16 has not the range of powers of two: there a step is one run, and its sum is scaled.
    in_tile = matrix.format == "mxfp4" and dtype != torch.float16
    step = tiling.k if in_tile or matrix.format == "plain" else RUN_OF.get(matrix.format, 128)
    if a.woven and (step != 128 or tiling.n not in (64, 128)):
        raise ValueError(f"rows are woven 128 columns at a time, but the product goes by {step} and {tiling.n}")
    codes = as_words(matrix.codes) if packed else matrix.codes
    words = codes.dtype == torch.int32
    width, by_engine = step // 8 if words else step, tiling.tma and (words or not packed)
    paired = packed and activation != "" and tiling.m >= PAIRED_FROM
    if paired:
        source, tma = pair_source(codes, tiling.n, width, by_engine)
    else:
        source, tma = tile_source(codes, [1, tiling.n, width], by_engine)
    return (source, codes.stride()), {
        "BM": tiling.m, "BN": tiling.n, "BK": step, "EVEN_K": depth % step == 0, "TMA": tma, "FORMAT": matrix.format,
        "PACKED": packed, "WORDS": words, "PAIRED": paired, "IN_TILE": in_tile,
        "ROWS": "codes" if a.scale is not None else "quantised" if quantize else "kept", "ACT": activation,
        "BIAS": matrix.bias is not None, "WOVEN": a.woven, "TO": TYPES[dtype], "WIDEN": interpreting(),
    }  # fmt: skip
