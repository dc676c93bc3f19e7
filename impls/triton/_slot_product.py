r"""A product per slot with weights as codes, in the tensor cores: both products of the quantised experts, few slots.

    first:   [g; u] = W_gate_up[e] @ x[token of slot] (+ bias)      out[slot] = act(g) * u
    second:  out[slot] = W_down[e] @ a[slot] (+ bias)

As `_quantized_product` without an alignment: each slot is a tile of its own, of which one row counts.  `_few_codes`
does the same without tensor cores, which takes about five instructions for each code, and by them it is bound.
"""

import torch
import triton
import triton.language as tl

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._common import after_previous, early_start, let_next_start, on
from moe_harness.impls.triton._quantized_operands import Matrix, Routing, Rows, scale_strides
from moe_harness.impls.triton._quantized_tile import constants_of, limit, product_tile
from moe_harness.impls.triton.alignment import local_expert
from moe_harness.impls.triton.configs import Tiling

# Numbers that are compiled for no value of theirs, as in `_quantized_product`.
UNSPECIALISED = [
    "S", "E", "top_k", "map_len", "id_row", "id_col", "as_row", "s_e", "s_n", "s_k", "b_e", "b_n",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def slot_product(
    a, a_scale, w, scale, bias, out, ids, emap, S, E, N, K, top_k, map_len, id_row, id_col, a_row, a_col, as_row,
    w_e, w_n, w_k, s_e, s_n, s_k, b_e, b_n, o_row, HAS_MAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr,
    WORDS: tl.constexpr, PAIRED: tl.constexpr, IN_TILE: tl.constexpr, ROWS: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, WOVEN: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of out at one slot; nothing is written for a masked one."""
    FIRST: tl.constexpr = ACT != ""
    if FIRST:
        after_previous(PDL)
        let_next_start(PDL)
    slot = tl.program_id(0)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    if not FIRST:
        after_previous(PDL)
        let_next_start(PDL)
    if e >= 0:
        lane = tl.arange(0, BM)
        row = tl.arange(0, 1 if ROWS == "quantised" else BM)  # its codes are made once, and stand in all columns
        product_tile(
            a, a_scale, w, scale, bias, out, out, e, row * 0 + (slot // top_k if FIRST else slot), row == 0,
            lane * 0 + slot, lane == 0, tl.program_id(1) * BN, N, K, a_row, a_col, as_row, w_e, w_n, w_k, s_e, s_n, s_k,
            b_e, b_n, o_row, 0, BM, BN, BK, EVEN_K, TMA, FORMAT, PACKED, WORDS, PAIRED, IN_TILE, ROWS, ACT,
            False, BIAS, WOVEN, TO, WIDEN,
        )  # fmt: skip


def slot_quantized(
    a: Rows, matrix: Matrix, routing: Routing, tiling: Tiling, dtype: torch.dtype, *, activation: str = "",
    quantize: bool = False,
) -> Rows:  # fmt: skip
    """`quantized_product` of a few rows, numbers or codes, as numbers; of the tiling's m columns one counts."""
    first, x = activation != "", a.values
    columns = matrix.codes.shape[1] // (2 if first else 1)
    ids, experts = routing.ids, len(matrix.codes)
    out = empty(x, ids.numel(), columns, dtype=dtype)
    emap = ids if routing.expert_map is None else routing.expert_map
    (source, strides), constants = constants_of(a, matrix, tiling, dtype, activation, quantize)
    early = early_start(out.device)
    with on(out.device):
        launch(
            slot_product, (ids.numel(), triton.cdiv(columns, tiling.n)),
            x, x if a.scale is None else a.scale, source, x if matrix.scale is None else matrix.scale,
            x if matrix.bias is None else matrix.bias, out, ids, emap, ids.numel(), experts, columns, x.shape[1],
            ids.shape[1], emap.numel(), *ids.stride(), *x.stride(), 0 if a.scale is None else a.scale.stride(0),
            *strides, *scale_strides(matrix), *((0, 0) if matrix.bias is None else matrix.bias.stride()),
            out.stride(0), HAS_MAP=routing.expert_map is not None, **constants, PDL=early, launch_pdl=early,
            num_warps=tiling.warps, num_stages=tiling.stages,
            **limit(tiling),
        )  # fmt: skip
    return Rows(out)
