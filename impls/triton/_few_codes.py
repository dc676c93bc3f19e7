r"""Products of a few rows with weights as codes, without tensor cores: bound by how fast the codes are read.

    first:   [g; u] = W_gate_up[e] @ x[token of slot] (+ bias)      out[slot] = act(g) * u
    second:  out[slot] = W_down[e] @ a[slot] (+ bias)

A program has one slot and BN columns of `out`, and asks for all of its codes before it uses the first: 16 bytes of a
row a thread.  They become fp32 and meet the activations there, which every thread holds for its own columns only; the
sum over a thread's columns is scaled and added up in fp32.
"""

import triton
import triton.language as tl

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._codes import as_float, half_power, quantised
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    interpreting,
    let_next_start,
    narrow,
    on,
)
from moe_harness.impls.triton._quantized_operands import (
    PACKED,
    RUN_OF,
    TYPES,
    Matrix,
    Routing,
    Rows,
    biased,
    hidden_values,
    scale_strides,
)
from moe_harness.impls.triton.alignment import local_expert
from moe_harness.impls.triton.configs import Tiling

# Numbers that are compiled for no value of theirs, as in `_quantized_product`.
UNSPECIALISED = [
    "S", "E", "top_k", "map_len", "id_row", "id_col", "s_e", "s_n", "s_k", "b_e", "b_n",
]  # fmt: skip


@triton.jit
def _columns(a, k, K, a_col, EVEN: tl.constexpr):
    return (
        tl.load(a + k.to(tl.int64) * a_col, mask=k < K, other=0.0) if not EVEN else tl.load(a + k.to(tl.int64) * a_col)
    )


@triton.jit
def _fake(rows, C: tl.constexpr, QUANTIZE: tl.constexpr, WIDEN: tl.constexpr):
    """[C, 16] numbers in fp32; QUANTIZE: as their codes of 128 columns under one scale have them."""
    rows = rows.to(tl.float32)
    if QUANTIZE:
        code, by = quantised(tl.reshape(rows, (C // 8, 128)), 1, WIDEN)
        rows = tl.reshape(code.to(tl.float32) * by[:, None], (C, 16))
    return rows


@triton.jit
def _codes(
    w, e, n0, N, k0, K, w_e, w_n, w_k, BN: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, SHARE: tl.constexpr
):
    """Bytes [BN, C, 16] of weight rows n0.. from column k0 on, SHARE codes in each."""
    n = n0 + tl.arange(0, BN)
    at = k0 // SHARE + tl.arange(0, C)[:, None] * 16 + tl.arange(0, 16)[None, :]
    pointer = w + e.to(tl.int64) * w_e + n[:, None, None].to(tl.int64) * w_n + at[None, :, :].to(tl.int64) * w_k
    mask = (n < N)[:, None, None]
    if not EVEN:
        mask = mask & (at < K // SHARE)[None, :, :]
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def _dots(
    tile, scale, e, n0, N, k0, K, rows, odd, s_e, s_n, s_k, BN: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr,
    PACKED: tl.constexpr, RUN: tl.constexpr, ONE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[BN, C]: 16 bytes of codes each times their columns of the activations."""
    if PACKED:
        low = as_float(tile & 15, FORMAT, tl.float32, WIDEN) * rows[None, :, :]
        sums = tl.sum(low + as_float(tile >> 4, FORMAT, tl.float32, WIDEN) * odd[None, :, :], 2)
    else:
        sums = tl.sum(as_float(tile, FORMAT, tl.float32, WIDEN) * rows[None, :, :], 2)
    if FORMAT != "plain":
        n = n0 + tl.arange(0, BN)
        k = k0 + tl.arange(0, C) * (32 if PACKED else 16)
        start = scale + e.to(tl.int64) * s_e + k // RUN * s_k
        if ONE:  # a block of 128 rows under one scale
            factor = tl.load(start + (n0 // 128).to(tl.int64) * s_n, mask=k < K, other=0)[None, :]
        else:
            row = n // 128 if FORMAT == "fp8_block" else n
            inside = (n < N)[:, None] & (k < K)[None, :]
            factor = tl.load(start[None, :] + row[:, None].to(tl.int64) * s_n, mask=inside, other=0)
        sums = sums * (half_power(factor) if FORMAT == "mxfp4" else factor.to(tl.float32))
    return sums


@triton.jit(do_not_specialize=UNSPECIALISED)
def few_product(
    a, w, scale, bias, out, ids, emap, S, E, N, top_k, map_len, id_row, id_col, a_row, a_col, w_e, w_n, w_k,
    s_e, s_n, s_k, b_e, b_n, o_row, K: tl.constexpr, HAS_MAP: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    FORMAT: tl.constexpr, PACKED: tl.constexpr, RUN: tl.constexpr, ONE: tl.constexpr, QUANTIZE: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, TO: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of out at one slot; C: pieces of 16 bytes of a row in one turn.

    The second product asks for codes before it waits for the first one.
    """
    SHARE: tl.constexpr = 2 if PACKED else 1
    STEP: tl.constexpr = C * 16 * SHARE
    EVEN: tl.constexpr = K % STEP == 0
    FIRST: tl.constexpr = ACT != ""
    if FIRST:
        after_previous(PDL)
        let_next_start(PDL)
    slot = tl.program_id(0)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    if e >= 0:
        n0 = tl.program_id(1) * BN
        start = a + (slot // top_k if FIRST else slot).to(tl.int64) * a_row
        acc = tl.zeros((BN, C), tl.float32)
        up = tl.zeros((BN, C), tl.float32)
        for k0 in tl.static_range(0, K, STEP):
            tile = _codes(w, e, n0, N, k0, K, w_e, w_n, w_k, BN, C, EVEN, SHARE)
            other = _codes(w, e, n0 + N, 2 * N, k0, K, w_e, w_n, w_k, BN, C, EVEN, SHARE) if FIRST else tile
            if k0 == 0 and not FIRST:
                after_previous(PDL)
                let_next_start(PDL)
            k = k0 + (tl.arange(0, C)[:, None] * 16 + tl.arange(0, 16)[None, :]) * SHARE
            rows = _fake(_columns(start, k, K, a_col, EVEN), C, QUANTIZE, WIDEN)
            odd = _fake(_columns(start, k + 1, K, a_col, EVEN), C, False, WIDEN) if PACKED else rows
            acc += _dots(tile, scale, e, n0, N, k0, K, rows, odd, s_e, s_n, s_k, BN, C, FORMAT, PACKED, RUN, ONE, WIDEN)
            if FIRST:
                up += _dots(
                    other, scale, e, n0 + N, 2 * N, k0, K, rows, odd, s_e, s_n, s_k, BN, C, FORMAT, PACKED, RUN, ONE,
                    WIDEN,
                )  # fmt: skip
        n = n0 + tl.arange(0, BN)
        y = biased(tl.sum(acc, 1)[:, None], bias, e, n, N, b_e, b_n, BIAS)
        if FIRST:
            u = biased(tl.sum(up, 1)[:, None], bias, e, n + N, 2 * N, b_e, b_n, BIAS)
            y = hidden_values(y, u, ACT, TO)
        at = out + slot.to(tl.int64) * o_row + n[:, None]
        tl.store(at, narrow(y, out.dtype.element_ty, WIDEN), mask=(n < N)[:, None])


def pieces_of(columns: int, packed: bool, most: int) -> int:
    """How many pieces of 16 bytes of a row are read in one turn: all where `most` allows, else a divisor's worth."""
    per = 32 if packed else 16
    pieces = triton.next_power_of_2(triton.cdiv(columns, per))
    if pieces > most:
        pieces = most
        while pieces > 8 and columns % (pieces * per):
            pieces //= 2
    return max(8, pieces)


def few_quantized(
    a: Rows, matrix: Matrix, routing: Routing, tiling: Tiling, *, activation: str = "", quantize: bool = False
) -> Rows:
    """`quantized_product` of a few rows; of the tiling count the columns `n` a program, the warps, and 16 bytes `k`
    times as the most of a row that is read in one turn."""
    first, x = activation != "", a.values
    tokens, top_k = routing.ids.shape
    experts, columns = len(matrix.codes), matrix.codes.shape[1] // (2 if first else 1)
    total, depth = tokens * top_k, x.shape[1]
    out = empty(x, total, columns)
    ids, packed = routing.ids, matrix.format in PACKED
    emap = ids if routing.expert_map is None else routing.expert_map
    early = early_start(out.device)
    one = matrix.format == "fp8_block" and columns % 128 == 0 and 128 % tiling.n == 0
    with on(out.device):
        launch(
            few_product, (total, triton.cdiv(columns, tiling.n)),
            x, matrix.codes, x if matrix.scale is None else matrix.scale, x if matrix.bias is None else matrix.bias,
            out, ids, emap, total, experts, columns, top_k, emap.numel(), *ids.stride(), *x.stride(),
            *matrix.codes.stride(), *scale_strides(matrix),
            *((0, 0) if matrix.bias is None else matrix.bias.stride()), out.stride(0),
            K=depth, HAS_MAP=routing.expert_map is not None, BN=tiling.n, C=pieces_of(depth, packed, tiling.k),
            FORMAT=matrix.format, PACKED=packed, RUN=RUN_OF.get(matrix.format, depth), ONE=one, QUANTIZE=quantize,
            ACT=activation, BIAS=matrix.bias is not None, TO=TYPES[x.dtype], WIDEN=interpreting(), PDL=early,
            launch_pdl=early, num_warps=tiling.warps,
        )  # fmt: skip
    return Rows(out)
