r"""Products of fp8 codes with fp8 codes on Hopper: one warpgroup copies, two multiply; both products of the experts.

    first:   [g; u] = sum over runs of 128 columns of (codes of W @ codes of x) * scale of W * scale of x
             out[row] = codes of act(g) * u, and the scale of each 128 of them
    second:  out[slot] the same sum over the hidden values, in the dtype of `out`

A tile is up to two units of 64 rows of one expert by two blocks of 128 rows of its weights (first: one of gate and the
one of up that belongs to it), whose scales are two numbers a step.  Each multiplying warpgroup has one unit.  A step is
128 columns, one run of scales: the tensor cores sum it, and the sum is scaled and added in fp32 while the other
warpgroup multiplies.  The rows of the first product are gathered by the warps that copy.

Tiles are handed out as in `_hopper`, by a counter for each product.  The second product asks for the weights of its
first tile while the first product still ends elsewhere: it waits before it reads what that one wrote, alone.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_harness.impls.launching import launch
from moe_harness.impls.triton._common import descriptor_strides, on, programs_at_once
from moe_harness.impls.triton._fp8_hopper_copy import RUN, UNITS, copy, copy_gathered, wait_for_previous
from moe_harness.impls.triton._hopper import STAGES, UNIT, after, announced, pipeline, tile_ends
from moe_harness.impls.triton._quantized_operands import Matrix, Routing, Rows


@gluon.jit
def _let_next_start():
    """`let_next_start` of _common."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _run(rows, w_tile, part, never):
    """The product of one run of columns, [64, 128], in the registers of `part`."""
    part = warpgroup_mma(rows, w_tile.reshape([RUN, RUN]).permute([1, 0]), part, use_acc=never, is_async=True)
    return warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def _sums(
    a_tiles, w_tiles, full, empty, stage, phase, a_scale, w_scale, live, ws_first, ws_second, ws_k: gl.constexpr, never,
    STEPS: gl.constexpr, WHICH: gl.constexpr, FENCE: gl.constexpr,
):  # fmt: skip
    """Both blocks of a tile for unit WHICH, [64, 128] each, and the stage and parity behind the tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    one = gl.zeros([UNIT, RUN], gl.float32, layout)
    two = gl.zeros([UNIT, RUN], gl.float32, layout)
    part = gl.zeros([UNIT, RUN], gl.float32, layout)
    by, by_one, by_two = (
        gl.load(a_scale, mask=live, other=0.0),
        gl.load(w_scale + ws_first),
        gl.load(w_scale + ws_second),
    )
    for step in range(STEPS):
        scale_one, scale_two = by * by_one, by * by_two
        mbarrier.wait(full.index(stage), phase)
        if FENCE:
            fence_async_shared()
        # Behind the fence, which waits for what was asked for before; needed in the next step.
        coming = gl.minimum(step + 1, STEPS - 1)
        by = gl.load(a_scale + coming, mask=live, other=0.0)
        by_one, by_two = gl.load(w_scale + ws_first + coming * ws_k), gl.load(w_scale + ws_second + coming * ws_k)
        rows = a_tiles.index(stage * UNITS + WHICH)
        part = _run(rows, w_tiles.index(stage * 2), part, never)
        one += part * scale_one[:, None]
        part = _run(rows, w_tiles.index(stage * 2 + 1), part, never)
        mbarrier.arrive(empty.index(stage))
        two += part * scale_two[:, None]
        stage, phase = after(stage, phase)
    return one, two, stage, phase


@gluon.jit
def _sigmoid(z):
    small = gl.exp2(gl.abs(z) * -1.4426950408889634)
    return gl.where(z >= 0, 1.0, small) / (1.0 + small)


@gluon.jit
def _hidden(g, u, ACT: gl.constexpr):
    """`hidden_values` of `_quantized_product` for results of 16 bits and less."""
    if ACT == "swiglu_oai":
        g = gl.where(g > 7.0, 7.0, g)
        u = gl.where(u > 7.0, 7.0, gl.where(u < -7.0, -7.0, u))
        out = (u + 1.0) * (g * _sigmoid(1.702 * g))
    elif ACT == "gelu_tanh":
        out = g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u
    else:
        out = g * _sigmoid(g) * u
    return out


@gluon.jit
def _write_codes(out, out_scale, h, row, rows, block, out_row: gl.constexpr, os_row: gl.constexpr):
    """Codes of 64 rows of 128 hidden values at columns of `block`, and their scales."""
    # 8 bytes a thread, and an exchange among the four threads of a row gets there.
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [UNIT, RUN],
    )  # fmt: skip
    by = gl.div_rn(gl.max(gl.where(h == h, gl.abs(h), 0.0), 1), 448.0)
    # 1 / by overflows for by under 2^-127: such rows are lifted first.
    lift = gl.where(by < 1e-30, 1.8446744073709552e19, 1.0)
    inverse = gl.div_rn(1.0, gl.where(by == 0.0, 1.0, by * lift))
    code = ((h * lift[:, None]) * inverse[:, None]).to(gl.float8e4nv)
    i = row + gl.arange(0, UNIT, gl.SliceLayout(1, h.type.layout))
    gl.store(out_scale + i.to(gl.int64) * os_row + block, by, mask=i < row + rows)
    code = gl.convert_layout(code, wide)
    i = gl.arange(0, UNIT, gl.SliceLayout(1, wide))
    col = block * RUN + gl.arange(0, RUN, gl.SliceLayout(0, wide))
    at = out + (row + i)[:, None].to(gl.int64) * out_row + col[None, :]
    gl.store(at, code, mask=(i < rows)[:, None])


@gluon.jit
def _write(out, slots, y, row, rows, column, out_row: gl.constexpr, N: gl.constexpr):
    """y [64, 128] at the slots of 64 rows, from `column` on."""
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [UNIT, RUN],
    )  # fmt: skip
    y = gl.convert_layout(y.to(out.dtype.element_ty), wide)
    i = gl.arange(0, UNIT, gl.SliceLayout(1, wide))
    col = column + gl.arange(0, RUN, gl.SliceLayout(0, wide))
    slot = gl.load(slots + row + i, mask=i < rows, other=0)
    at = out + slot[:, None].to(gl.int64) * out_row + col[None, :]
    gl.store(at, y, mask=(i < rows)[:, None] & (col < N)[None, :])


@gluon.jit
def _multiply(
    out, out_scale, slots, notes, a_tiles, w_tiles, full, empty, a_scale, w_scale, as_row: gl.constexpr,
    ws_e: gl.constexpr, ws_n: gl.constexpr, ws_k: gl.constexpr, out_row: gl.constexpr, os_row: gl.constexpr,
    K: gl.constexpr, N: gl.constexpr, n_blocks: gl.constexpr, top_k: gl.constexpr, WHICH: gl.constexpr,
    ACT: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: unit WHICH of every tile."""
    STEPS: gl.constexpr = K // RUN
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    stage, phase = 0, 0
    if ACT == "":
        wait_for_previous()
    row, rows, units, where = announced(notes, full, stage, phase)
    while units > 0:
        e = where // n_blocks
        block = where % n_blocks
        if units > WHICH:
            row += WHICH * UNIT
            rows -= WHICH * UNIT
            i = gl.arange(0, UNIT, gl.SliceLayout(1, layout))
            live = i < rows
            if ACT != "":
                at = gl.load(slots + row + i, mask=live, other=0) // top_k
                first, second = block, N // RUN + block
            else:
                at = row + i
                first, second = block * 2, gl.minimum(block * 2 + 1, N // RUN - 1)
            base = e.to(gl.int64) * ws_e
            one, two, stage, phase = _sums(
                a_tiles, w_tiles, full, empty, stage, phase, a_scale + at.to(gl.int64) * as_row, w_scale, live,
                base + first * ws_n, base + second * ws_n, ws_k, e < 0, STEPS, WHICH, ACT != "",
            )  # fmt: skip
            if ACT != "":
                _write_codes(out, out_scale, _hidden(one, two, ACT), row, rows, block, out_row, os_row)
            else:
                _write(out, slots, one, row, rows, block * 2 * RUN, out_row, N)
                _write(out, slots, two, row, rows, block * 2 * RUN + RUN, out_row, N)
        else:
            for _ in range(STEPS):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage))
                stage, phase = after(stage, phase)
        row, rows, units, where = announced(notes, full, stage, phase)


@gluon.jit
def _fp8_hopper(
    a, a_scale, w, w_scale, out, out_scale, counts, slots, a_row: gl.constexpr, as_row: gl.constexpr,
    ws_e: gl.constexpr, ws_n: gl.constexpr, ws_k: gl.constexpr, out_row: gl.constexpr, os_row: gl.constexpr,
    E: gl.constexpr, K: gl.constexpr, N: gl.constexpr, top_k: gl.constexpr, BLOCK_E: gl.constexpr,
    GROUP: gl.constexpr, ACT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A persistent program; a_tiles hold units of 64 rows, w_tiles blocks of 128.

    N: columns of `out`.  ACT: of the first product, whose weights have twice as many rows.
    """
    GATED: gl.constexpr = ACT != ""
    if GATED:
        wait_for_previous()
    _let_next_start()
    a_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * UNITS, UNIT, RUN], gl.NVMMASharedLayout(128, 8, 2))
    w_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 1, RUN, RUN], gl.NVMMASharedLayout(128, 8, 3))
    n_blocks: gl.constexpr = (N + RUN - 1) // RUN if GATED else (N + 2 * RUN - 1) // (2 * RUN)
    total = gl.max(tile_ends(counts, E, n_blocks, BLOCK_E, UNITS), 0)
    # fmt: off
    if GATED:
        notes, full, empty = pipeline(1 + 128)  # the weights, and the rows of every thread that copies
        gl.warp_specialize(
            [
                (_multiply, (out, out_scale, slots, notes, a_tiles, w_tiles, full, empty, a_scale, w_scale, as_row,
                             ws_e, ws_n, ws_k, out_row, os_row, K, N, n_blocks, top_k, gl.constexpr(0), ACT)),
                (_multiply, (out, out_scale, slots, notes, a_tiles, w_tiles, full, empty, a_scale, w_scale, as_row,
                             ws_e, ws_n, ws_k, out_row, os_row, K, N, n_blocks, top_k, gl.constexpr(1), ACT)),
                (copy_gathered, (a, w, counts, slots, notes, a_tiles, w_tiles, full, empty, total, a_row, E, K, N,
                                  n_blocks, top_k, BLOCK_E, GROUP)),
            ],
            [4, 4], [232, 40],
        )
    else:
        notes, full, empty = pipeline(2)  # the weights, and the rows
        gl.warp_specialize(
            [
                (_multiply, (out, out_scale, slots, notes, a_tiles, w_tiles, full, empty, a_scale, w_scale, as_row,
                             ws_e, ws_n, ws_k, out_row, os_row, K, N, n_blocks, top_k, gl.constexpr(0), ACT)),
                (_multiply, (out, out_scale, slots, notes, a_tiles, w_tiles, full, empty, a_scale, w_scale, as_row,
                             ws_e, ws_n, ws_k, out_row, os_row, K, N, n_blocks, top_k, gl.constexpr(1), ACT)),
                (copy, (a, w, counts, notes, a_tiles, w_tiles, full, empty, total, E, K, n_blocks, BLOCK_E, GROUP)),
            ],
            [4, 1], [232, 40],
        )
    # fmt: on


def fits(a: Rows, matrix: Matrix, first: bool) -> bool:
    """Whether rows [S, K] and weights [E, N, K] suit this kernel: codes of fp8_block both, without biases.

    Whole runs of 128 along K and N (of gate and up each); E from 2 to 1024; aligned to 16 bytes, contiguous along K.
    """
    codes = matrix.codes
    return (
        a.scale is not None and matrix.format == "fp8_block" and matrix.scale is not None and matrix.bias is None
        and matrix.scale.dtype == torch.float32
        and descriptor_strides(a.values) is not None and descriptor_strides(codes) is not None
        and codes.shape[2] % 128 == 0 and codes.shape[1] % (256 if first else 128) == 0 and 2 <= len(codes) <= 1024
    )  # fmt: skip


def fp8_hopper(a: Rows, matrix: Matrix, routing: Routing, out: Rows, activation: str, group: int) -> None:
    """Write `out`, codes with their scales or numbers, for operands that `fits` accepts."""
    weight, scale = matrix.codes, matrix.scale
    assert a.scale is not None and scale is not None
    source = TensorDescriptor(
        weight, list(weight.shape), descriptor_strides(weight), [1, RUN.value, RUN.value],
        gl.NVMMASharedLayout(128, 8, 3),
    )  # fmt: skip
    rows: object = a.values
    if not activation:
        rows = TensorDescriptor(
            a.values, list(a.values.shape), descriptor_strides(a.values), [UNIT.value, RUN.value],
            gl.NVMMASharedLayout(128, 8, 2),
        )  # fmt: skip
    out_scale = a.scale if out.scale is None else out.scale
    experts = len(weight)
    with on(weight.device):
        launch(
            _fp8_hopper, (programs_at_once(weight.device),),
            rows, a.scale, source, scale, out.values, out_scale, routing.counts, routing.slots,
            a.values.stride(0), a.scale.stride(0), *scale.stride(), out.values.stride(0), out_scale.stride(0),
            E=experts, K=a.values.shape[1], N=out.values.shape[1], top_k=routing.ids.shape[1],
            BLOCK_E=max(32, triton.next_power_of_2(experts)), GROUP=group, ACT=activation,
            launch_pdl=True, num_warps=4,
        )  # fmt: skip
