r"""Second product of the experts on Hopper, with one warp that copies and two warpgroups that multiply.

The same function as `linear` with slots and without a bias, in tiles of up to 192 rows by 256 columns.  Both operands
come through the copy engine; rows of the next expert may come along, their results are never stored.  `linear` decides
where it can run.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_harness.impls.launching import launch
from moe_harness.impls.triton._common import descriptor_strides, on, programs_at_once
from moe_harness.impls.triton._hopper import (
    COLUMNS,
    STAGES,
    STEP,
    UNIT,
    UNITS,
    after,
    announce,
    announced,
    find_tile,
    load_tile,
    multiply,
    pass_by,
    pipeline,
    take,
    tile_ends,
)


@gluon.jit
def _copy(
    a, w, counts, notes, a_tiles, w_tiles, full, empty, total, E: gl.constexpr, K: gl.constexpr,
    n_blocks: gl.constexpr, BLOCK_E: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that copies: announces a tile, fills its stages, fetches the next; then announces the end."""
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    ends = tile_ends(counts, E, n_blocks, BLOCK_E, UNITS)
    stage, phase = 0, 1
    tile = gl.program_id(0)
    while tile < total:
        e, row, rows, units, block = find_tile(tile, counts, ends, E, n_blocks, GROUP, UNITS)
        mbarrier.wait(empty.index(stage), phase)
        announce(notes, stage, row, rows, units, block)
        upcoming = total
        for step in range(STEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if units == 1:
                mbarrier.expect(bar, (COLUMNS + UNIT) * STEP * 2)
            elif units == 2:
                mbarrier.expect(bar, (COLUMNS + 2 * UNIT) * STEP * 2)
            else:
                mbarrier.expect(bar, (COLUMNS + 3 * UNIT) * STEP * 2)
            load_tile(w, [e, block * COLUMNS, step * STEP], bar, w_tiles.index(stage))
            load_tile(a, [row, step * STEP], bar, a_tiles.index(stage * UNITS))
            if units > 1:
                load_tile(a, [row + UNIT, step * STEP], bar, a_tiles.index(stage * UNITS + 1))
            if units > 2:
                load_tile(a, [row + 2 * UNIT, step * STEP], bar, a_tiles.index(stage * UNITS + 2))
            if step == STEPS // 2:  # takes a microsecond, while the stages are full
                upcoming = take(counts + 2 * E, total)
            stage, phase = after(stage, phase)
        tile = upcoming
    mbarrier.wait(empty.index(stage), phase)
    announce(notes, stage, 0, 0, 0, 0)
    mbarrier.expect(full.index(stage), 0)


@gluon.jit
def _write(y, slots, acc, row, rows, column, N: gl.constexpr, y_row):
    """y at the slots of 64 rows, from `column` on."""
    WIDTH: gl.constexpr = acc.shape[1]
    # 8 bytes a thread, and an exchange among the four threads of a row gets there.
    held: gl.constexpr = [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]]
    wide: gl.constexpr = gl.DistributedLinearLayout(
        held + [[0, 128]] if WIDTH == 256 else held,
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [UNIT, WIDTH],
    )  # fmt: skip
    out = gl.convert_layout(acc.to(y.dtype.element_ty), wide)
    i = gl.arange(0, UNIT, gl.SliceLayout(1, wide))
    col = column + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    slot = gl.load(slots + row + i, mask=i < rows, other=0)
    at = y + slot[:, None].to(gl.int64) * y_row + col[None, :]
    gl.store(at, out, mask=(i < rows)[:, None] & (col < N)[None, :])


@gluon.jit
def _multiply(
    y, slots, notes, a_tiles, w_tiles, full, empty, y_row, K: gl.constexpr, N: gl.constexpr, WHICH: gl.constexpr
):
    """A warpgroup that multiplies: the unit WHICH of every tile, and of a third one one half of the columns."""
    STEPS: gl.constexpr = (K + STEP - 1) // STEP
    stage, phase = 0, 0
    row, rows, units, block = announced(notes, full, stage, phase)
    while units > 0:
        column = block * COLUMNS
        if units > WHICH:
            if units == UNITS:
                acc, more, stage, phase = multiply(
                    a_tiles, w_tiles, full, empty, stage, phase, STEPS, WHICH, THIRD=True, FENCE=False
                )
                _write(y, slots, more, row + 2 * UNIT, rows - 2 * UNIT, column + WHICH * (COLUMNS // 2), N, y_row)
            else:
                acc, more, stage, phase = multiply(
                    a_tiles, w_tiles, full, empty, stage, phase, STEPS, WHICH, THIRD=False, FENCE=False
                )
            _write(y, slots, acc, row + WHICH * UNIT, rows - WHICH * UNIT, column, N, y_row)
        else:
            stage, phase = pass_by(full, empty, stage, phase, STEPS)
        row, rows, units, block = announced(notes, full, stage, phase)


@gluon.jit
def _linear_hopper(
    a, w, y, counts, slots, y_row, E: gl.constexpr, K: gl.constexpr, N: gl.constexpr, BLOCK_E: gl.constexpr,
    GROUP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A persistent program; a_tiles hold units of 64 rows."""
    gl.inline_asm_elementwise(  # `after_previous` and `let_next_start`
        "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    dtype: gl.constexpr = y.dtype.element_ty
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES * UNITS, UNIT, STEP], gl.NVMMASharedLayout(128, 16, 2))
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, COLUMNS, STEP], gl.NVMMASharedLayout(128, 16, 3))
    notes, full, empty = pipeline(1)
    n_blocks: gl.constexpr = (N + COLUMNS - 1) // COLUMNS
    total = gl.max(tile_ends(counts, E, n_blocks, BLOCK_E, UNITS), 0)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (y, slots, notes, a_tiles, w_tiles, full, empty, y_row, K, N, gl.constexpr(0))),
            (_multiply, (y, slots, notes, a_tiles, w_tiles, full, empty, y_row, K, N, gl.constexpr(1))),
            (_copy, (a, w, counts, notes, a_tiles, w_tiles, full, empty, total, E, K, n_blocks, BLOCK_E, GROUP)),
        ],
        [4, 1], [232, 40],
    )
    # fmt: on


def linear_hopper(a: Tensor, weight: Tensor, y: Tensor, counts: Tensor, slots: Tensor, group: int) -> None:
    """Write `y` as `linear` does, for operands that `suits` accepts."""
    source = TensorDescriptor(
        weight, list(weight.shape), descriptor_strides(weight), [1, COLUMNS.value, STEP.value],
        gl.NVMMASharedLayout(128, 16, 3),
    )  # fmt: skip
    rows = TensorDescriptor(
        a, list(a.shape), descriptor_strides(a), [UNIT.value, STEP.value], gl.NVMMASharedLayout(128, 16, 2)
    )
    experts = len(weight)
    with on(a.device):
        launch(
            _linear_hopper, (programs_at_once(a.device),),
            rows, source, y, counts, slots, y.stride(0), E=experts, K=a.shape[1], N=weight.shape[1],
            BLOCK_E=max(32, triton.next_power_of_2(experts)), GROUP=group, launch_pdl=True, num_warps=4,
        )  # fmt: skip
