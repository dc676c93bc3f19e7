r"""A product per expert with weights as codes, in tiles: both products of the quantised experts behind an alignment.

    first:   [g; u] = W_gate_up[e] @ x[token of slot] (+ bias)      out[row] = act(g) * u
    second:  out[slot] = W_down[e] @ a[row] (+ bias)

Rows come in the order of the experts; a tile of them and of the weights is `_quantized_tile`'s.

Rounded to the dtype of `out` on the way: what is stored, alone.  Where `out` are codes, the first product quantises its
hidden values itself, 128 columns under one scale, and nothing else rounds them.
"""

import torch
import triton
import triton.language as tl

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._codes import RUN
from moe_harness.impls.triton._common import after_previous, early_start, let_next_start, on, on_hopper
from moe_harness.impls.triton._few_codes import few_quantized
from moe_harness.impls.triton._quantized_operands import Matrix, Routing, Rows, codes_for, columns_of, scale_strides
from moe_harness.impls.triton._quantized_tile import constants_of, limit, product_tile
from moe_harness.impls.triton._slot_product import slot_quantized
from moe_harness.impls.triton._tiles import expert_runs, find_tile
from moe_harness.impls.triton.configs import Tiling, grid_size

# Numbers that are compiled for no value of theirs: kernels of a layer differ in its sizes and strides enough already.
UNSPECIALISED = ["E", "top_k", "as_row", "s_e", "s_n", "s_k", "b_e", "b_n", "os_row"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def _product(
    a, a_scale, w, scale, bias, out, out_scale, counts, slots, E, N, K, top_k, a_row, a_col, as_row, w_e, w_n, w_k,
    s_e, s_n, s_k, b_e, b_n, o_row, os_row, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, FORMAT: tl.constexpr,
    PACKED: tl.constexpr, WORDS: tl.constexpr, PAIRED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr,
    ACT: tl.constexpr, CODES: tl.constexpr, BIAS: tl.constexpr, WOVEN: tl.constexpr, TO: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
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
        product_tile(
            a, a_scale, w, scale, bias, out, out_scale, e, slot // top_k if ACT != "" else row, live,
            row if ACT != "" else slot, live, n * BN, N, K, a_row, a_col, as_row, w_e, w_n, w_k, s_e, s_n, s_k,
            b_e, b_n, o_row, os_row, BM, BN, BK, EVEN_K, TMA, FORMAT, PACKED, WORDS, PAIRED, IN_TILE, ROWS, ACT,
            CODES, BIAS, WOVEN, TO, WIDEN,
        )  # fmt: skip


def quantized_product(
    a: Rows, matrix: Matrix, routing: Routing, tiling: Tiling, expected: int, dtype: torch.dtype, *,
    activation: str = "", quantize: bool = False, codes: bool = False,
) -> Rows:  # fmt: skip
    """The first product with an `activation`, rows [S, N / 2] in the order of the runs; else the second, in slot order.

    Of woven rows the first gives woven ones.

    Args:
        expected: the number of rows the grid is sized for; more are handled.
        dtype: of what is stored.
        quantize: rows that are not codes become codes, 128 columns under one scale, before the product.
        codes: what is returned are codes; tiles have to be 128 columns wide.
    """
    if routing.counts is None or routing.slots is None:
        if tiling.m > 1:
            return slot_quantized(a, matrix, routing, tiling, dtype, activation=activation, quantize=quantize)
        return few_quantized(a, matrix, routing, tiling, activation=activation, quantize=quantize)
    first = activation != ""
    columns = matrix.codes.shape[1] // (2 if first else 1)
    total = routing.ids.numel()
    if codes and tiling.n != RUN.value:
        raise ValueError(f"tiles of {tiling.n} columns cannot be quantised, but those of {RUN.value} can")
    out_scale = empty(a.values, total, triton.cdiv(columns, RUN.value), dtype=torch.float32) if codes else None
    woven = a.woven and first
    width = triton.cdiv(columns, RUN.value) * RUN.value if woven else columns
    values = codes_for(a.values, total, columns) if codes else empty(a.values, total, width, dtype=dtype)
    out = Rows(values, out_scale, woven)
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
    experts, depth, columns = len(matrix.codes), columns_of(matrix), matrix.codes.shape[1] // (2 if activation else 1)
    (source, strides), constants = constants_of(a, matrix, tiling, dtype, activation, quantize)
    early = early_start(out.values.device)
    none = a.values
    with on(out.values.device):
        launch(
            _product, (grid_size(tiling, expected, experts, columns, out.values.device),),
            a.values, none if a.scale is None else a.scale, source, none if matrix.scale is None else matrix.scale,
            none if matrix.bias is None else matrix.bias, out.values, none if out.scale is None else out.scale,
            routing.counts, routing.slots, experts, columns, depth, routing.ids.shape[1],
            *a.values.stride(), 0 if a.scale is None else a.scale.stride(0),
            *strides, *scale_strides(matrix), *((0, 0) if matrix.bias is None else matrix.bias.stride()),
            out.values.stride(0), 0 if out.scale is None else out.scale.stride(0),
            BLOCK_E=max(32, triton.next_power_of_2(experts)), GROUP=tiling.group, CODES=out.scale is not None,
            **constants, PDL=early, launch_pdl=early, num_warps=tiling.warps, num_stages=tiling.stages,
            **limit(tiling),
        )  # fmt: skip
