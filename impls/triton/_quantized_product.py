r"""A product per expert with weights as codes, in tiles: both products of the quantised experts behind an alignment.

    first:   [g; u] = W_gate_up[e] @ x[token of slot] (+ bias)      out[row] = act(g) * u
    second:  out[slot] = W_down[e] @ a[row] (+ bias)

Tiles are computed transposed, weights first: as first operand they may lie in registers, where their codes were made
numbers, and a few rows of activations still fill a wide product.  Rows come in the order of the experts.

Rounded to the dtype of `out` on the way: what is stored, alone.  Where `out` are codes, the first product quantises its
hidden values itself, 128 columns under one scale, and nothing else rounds them.
"""

import torch
import triton
import triton.language as tl

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._codes import RUN, as_float, as_stored, half_power, quantised, row_scales, wide
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
from moe_harness.impls.triton._few_codes import few_quantized
from moe_harness.impls.triton._half_bytes import half_bytes, scaled_half_bytes
from moe_harness.impls.triton._quantized_operands import (
    PACKED,
    RUN_OF,
    TYPES,
    Matrix,
    Routing,
    Rows,
    biased,
    codes_for,
    hidden_values,
    scale_strides,
)
from moe_harness.impls.triton._tiles import expert_runs, find_tile, row_tile, weight_tile
from moe_harness.impls.triton.configs import Tiling, grid_size

# Numbers that are compiled for no value of theirs: kernels of a layer differ in its sizes and strides enough already.
UNSPECIALISED = ["E", "top_k", "as_row", "s_e", "s_n", "s_k", "b_e", "b_n", "os_row"]


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
def _tile(
    a, a_scale, w, scale, bias, out, out_scale, e, from_row, to_row, live, n0, N, K, a_row, a_col, as_row,
    w_e, w_n, w_k, s_e, s_n, s_k, b_e, b_n, o_row, os_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
    CODES: tl.constexpr, BIAS: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out at rows to_row [BM] and BN columns from n0 on, of expert e and rows from_row [BM] of a.

    Scales are asked for a step before they are needed: nothing else in the loop would wait for memory.
    """
    GATED: tl.constexpr = ACT != ""
    HAS: tl.constexpr = FORMAT != "plain"
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    found, found_up = 0, 0
    if HAS:
        found = _scales(scale, e, n0, N, 0, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
        if GATED:
            found_up = _scales(scale, e, n0 + N, 2 * N, 0, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
    by = row_scales(a_scale, from_row, live, 0, K, as_row, BK, ROWS)
    for k0 in tl.range(0, K, BK):
        by_now, now, now_up = by, found, found_up
        by = row_scales(a_scale, from_row, live, k0 + BK, K, as_row, BK, ROWS)
        if HAS:
            found = _scales(scale, e, n0, N, k0 + BK, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
            if GATED:
                found_up = _scales(scale, e, n0 + N, 2 * N, k0 + BK, K, s_e, s_n, s_k, BN, BK, FORMAT, IN_TILE)
        rows = row_tile(a, from_row, live, k0, K, a_row, a_col, BK, EVEN_K)
        if ROWS == "quantised":
            rows, by_now = quantised(rows, 1, WIDEN)
        elif ROWS == "codes":
            rows = wide(rows, WIDEN)
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


@triton.jit(do_not_specialize=UNSPECIALISED)
def _product(
    a, a_scale, w, scale, bias, out, out_scale, counts, slots, E, N, K, top_k, a_row, a_col, as_row, w_e, w_n, w_k,
    s_e, s_n, s_k, b_e, b_n, o_row, os_row, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, FORMAT: tl.constexpr,
    PACKED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
    BIAS: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of BM rows and BN columns of out."""
    after_previous(PDL)
    let_next_start(PDL)
    n_blocks = tl.cdiv(N, BN)
    lane = tl.arange(0, BM)
    rows, ends = expert_runs(counts, 1, E, n_blocks, BLOCK_E, BM, 0)
    for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        e, count, start, m, n = find_tile(tile, counts, 1, rows, ends, n_blocks, BM, 0, GROUP)
        live = m * BM + lane < count
        row = start + m * BM + lane
        slot = tl.load(slots + row, mask=live, other=0)
        _tile(
            a, a_scale, w, scale, bias, out, out_scale, e, slot // top_k if ACT != "" else row,
            row if ACT != "" else slot, live, n * BN, N, K, a_row, a_col, as_row, w_e, w_n, w_k, s_e, s_n, s_k,
            b_e, b_n, o_row, os_row, BM, BN, BK, EVEN_K, TMA, FORMAT, PACKED, IN_TILE, ROWS, ACT, CODES, BIAS, TO,
            WIDEN,
        )  # fmt: skip


def quantized_product(
    a: Rows, matrix: Matrix, routing: Routing, tiling: Tiling, expected: int, dtype: torch.dtype, *,
    activation: str = "", quantize: bool = False, codes: bool = False,
) -> Rows:  # fmt: skip
    """The first product with an `activation`, rows [S, N / 2] in the order of the runs; else the second, in slot order.

    Args:
        expected: the number of rows the grid is sized for; more are handled.
        dtype: of what is stored.
        quantize: rows that are not codes become codes, 128 columns under one scale, before the product.
        codes: what is returned are codes; tiles have to be 128 columns wide.
    """
    if routing.counts is None or routing.slots is None:
        return few_quantized(a, matrix, routing, tiling, activation=activation, quantize=quantize)
    first = activation != ""
    columns = matrix.codes.shape[1] // (2 if first else 1)
    total = routing.ids.numel()
    if codes and tiling.n != RUN.value:
        raise ValueError(f"tiles of {tiling.n} columns cannot be quantised, but those of {RUN.value} can")
    out_scale = empty(a.values, total, triton.cdiv(columns, RUN.value), dtype=torch.float32) if codes else None
    out = Rows(
        codes_for(a.values, total, columns) if codes else empty(a.values, total, columns, dtype=dtype), out_scale
    )
    if tiling.copier and codes == first and on_hopper(out.values.device):
        from moe_harness.impls.triton._fp8_hopper import fits, fp8_hopper

        if fits(a, matrix, first):
            fp8_hopper(a, matrix, routing, out, activation, tiling.group)
            return out
    _in_tiles(a, matrix, routing, out, tiling, expected, dtype, activation, quantize)
    return out


def _in_tiles(
    a: Rows, matrix: Matrix, routing: Routing, out: Rows, tiling: Tiling, expected: int, dtype: torch.dtype,
    activation: str, quantize: bool,
) -> None:  # fmt: skip
    """Write `out` with the kernel of this module."""
    experts, depth, columns = len(matrix.codes), a.values.shape[1], out.values.shape[1]
    packed = matrix.format in PACKED
    # fp16 has not the range of powers of two: there a step is one run, and its sum is scaled.
    in_tile = matrix.format == "mxfp4" and dtype != torch.float16
    step = tiling.k if in_tile or matrix.format == "plain" else RUN_OF.get(matrix.format, 128)
    source, tma = tile_source(matrix.codes, [1, tiling.n, step // 2 if packed else step], tiling.tma)
    early = early_start(out.values.device)
    none = a.values
    with on(out.values.device):
        launch(
            _product, (grid_size(tiling, expected, experts, columns, out.values.device),),
            a.values, none if a.scale is None else a.scale, source, none if matrix.scale is None else matrix.scale,
            none if matrix.bias is None else matrix.bias, out.values, none if out.scale is None else out.scale,
            routing.counts, routing.slots, experts, columns, depth, routing.ids.shape[1],
            *a.values.stride(), 0 if a.scale is None else a.scale.stride(0),
            *matrix.codes.stride(), *scale_strides(matrix), *((0, 0) if matrix.bias is None else matrix.bias.stride()),
            out.values.stride(0), 0 if out.scale is None else out.scale.stride(0),
            BLOCK_E=max(32, triton.next_power_of_2(experts)), GROUP=tiling.group, BM=tiling.m, BN=tiling.n, BK=step,
            EVEN_K=depth % step == 0, TMA=tma, FORMAT=matrix.format, PACKED=packed, IN_TILE=in_tile,
            ROWS="codes" if a.scale is not None else "quantised" if quantize else "kept", ACT=activation,
            CODES=out.scale is not None, BIAS=matrix.bias is not None, TO=TYPES[dtype], WIDEN=interpreting(),
            PDL=early, launch_pdl=early, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
