r"""First product of the experts on Hopper, with one warpgroup that copies and two that multiply.

The same function as `gate_up`, in tiles of up to 192 rows by 128 columns of act, which take 128 gate and 128 up rows of
the weights as one product of 256 columns.  The warps that multiply never compute an address nor issue a copy, and the
copies of the next tile run while this one is written.  Triton's own pipeline cannot do that for gathered rows.
`gate_up` decides where it can run.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    load_rows,
    load_tile,
    multiply,
    pass_by,
    pipeline,
    suits,
    take,
    tile_ends,
)

HALF = gl.constexpr(64)  # columns of act, half of a tile's: their gate rows lie before their up rows


@gluon.jit
def _row_pointers(x, slots, row, rows, top_k: gl.constexpr, x_row):
    """Pointers [64, STEP] to the first columns of the tokens of 64 slots from `row` on, and which of them exist."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, UNIT, gl.SliceLayout(1, layout))
    token = gl.load(slots + row + i, mask=i < rows, other=0) // top_k
    k = gl.arange(0, STEP, gl.SliceLayout(0, layout))
    return x + token.to(gl.int64)[:, None] * x_row + k[None, :], (i < rows)[:, None]


@gluon.jit
def _copy(
    x, w, counts, slots, notes, x_tiles, w_tiles, full, empty, total, x_row, E: gl.constexpr, H: gl.constexpr,
    n_blocks: gl.constexpr, top_k: gl.constexpr, BLOCK_E: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warpgroup that copies: announces a tile, fills its stages, fetches the next; then announces the end."""
    ends = tile_ends(counts, E, n_blocks, BLOCK_E, UNITS)
    stage, phase = 0, 1
    tile = gl.program_id(0)
    while tile < total:
        e, row, rows, units, block = find_tile(tile, counts, ends, E, n_blocks, GROUP, UNITS)
        upper, live_upper = _row_pointers(x, slots, row, rows, top_k, x_row)
        lower, live_lower = _row_pointers(x, slots, row + UNIT, rows - UNIT, top_k, x_row)
        third, live_third = _row_pointers(x, slots, row + 2 * UNIT, rows - 2 * UNIT, top_k, x_row)
        mbarrier.wait(empty.index(stage), phase)
        announce(notes, stage, row, rows, units, block)
        upcoming = total
        for step in range(H // STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, COLUMNS * STEP * 2)
            w_tile = w_tiles.index(stage)
            load_tile(w, [e, 0, block * 2 * HALF, step * STEP], bar, w_tile.slice(0, 1, 0))
            load_tile(w, [e, 0, block * 2 * HALF + HALF, step * STEP], bar, w_tile.slice(1, 1, 0))
            load_rows(x_tiles.index(stage * UNITS), upper, mask=live_upper)
            if units > 1:
                load_rows(x_tiles.index(stage * UNITS + 1), lower, mask=live_lower)
            if units > 2:
                load_rows(x_tiles.index(stage * UNITS + 2), third, mask=live_third)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            upper += STEP
            lower += STEP
            third += STEP
            if step == H // STEP // 2:  # takes a microsecond, while the stages are full
                upcoming = take(counts + 2 * E, total)
            stage, phase = after(stage, phase)
        tile = upcoming
    mbarrier.wait(empty.index(stage), phase)
    announce(notes, stage, 0, 0, 0, 0)
    mbarrier.expect(full.index(stage), 0)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _gated(g, u, GELU: gl.constexpr):
    """`gated` of _common for results of 16 bits."""
    z = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    small = gl.exp2(gl.abs(z) * -1.4426950408889634)
    return g * (gl.where(z >= 0, 1.0, small) / (1.0 + small)) * u


@gluon.jit
def _write(act, acc, row, rows, column, WIDTH: gl.constexpr, act_row, GELU: gl.constexpr):
    """act at (row, column) of a product of 64 rows by one or two blocks of HALF gate and HALF up rows."""
    BLOCKS: gl.constexpr = acc.shape[1] // (2 * HALF)
    # 8 bytes a thread, and an exchange among the four threads of a row gets there.
    held: gl.constexpr = [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]]
    wide: gl.constexpr = gl.DistributedLinearLayout(
        held + [[0, 64]] if BLOCKS == 2 else held,
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [UNIT, HALF * BLOCKS],
    )  # fmt: skip
    g, u = gl.split(gl.permute(gl.reshape(acc, [UNIT, BLOCKS, 2, HALF]), [0, 1, 3, 2]))
    out = gl.reshape(_gated(g, u, GELU).to(act.dtype.element_ty), [UNIT, HALF * BLOCKS])
    out = gl.convert_layout(out, wide)
    i = gl.arange(0, UNIT, gl.SliceLayout(1, wide))
    col = column + gl.arange(0, HALF * BLOCKS, gl.SliceLayout(0, wide))
    at = act + (row + i)[:, None].to(gl.int64) * act_row + col[None, :]
    gl.store(at, out, mask=(i < rows)[:, None] & (col < WIDTH)[None, :])


@gluon.jit
def _multiply(
    act, notes, x_tiles, w_tiles, full, empty, act_row, H: gl.constexpr, WIDTH: gl.constexpr, WHICH: gl.constexpr,
    GELU: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: the unit WHICH of every tile, and of a third one the columns of one half."""
    STEPS: gl.constexpr = H // STEP
    stage, phase = 0, 0
    row, rows, units, block = announced(notes, full, stage, phase)
    while units > 0:
        column = block * 2 * HALF
        if units > WHICH:
            if units == UNITS:
                acc, more, stage, phase = multiply(
                    x_tiles, w_tiles, full, empty, stage, phase, STEPS, WHICH, THIRD=True, FENCE=True
                )
                _write(act, more, row + 2 * UNIT, rows - 2 * UNIT, column + WHICH * HALF, WIDTH, act_row, GELU)
            else:
                acc, more, stage, phase = multiply(
                    x_tiles, w_tiles, full, empty, stage, phase, STEPS, WHICH, THIRD=False, FENCE=True
                )
            _write(act, acc, row + WHICH * UNIT, rows - WHICH * UNIT, column, WIDTH, act_row, GELU)
        else:
            stage, phase = pass_by(full, empty, stage, phase, STEPS)
        row, rows, units, block = announced(notes, full, stage, phase)


@gluon.jit
def _gate_up_hopper(
    x, w, act, counts, slots, x_row, act_row, E: gl.constexpr, H: gl.constexpr, WIDTH: gl.constexpr,
    top_k: gl.constexpr, BLOCK_E: gl.constexpr, GROUP: gl.constexpr, GELU: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A persistent program; x_tiles hold units of 64 rows, w_tiles twice HALF gate rows before HALF up rows.

    Sizes are constants: as arguments they cost the copying warps registers that they need for pointers (7 % of the
    time at 4096 tokens).
    """
    gl.inline_asm_elementwise(  # `after_previous` and `let_next_start`
        "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    dtype: gl.constexpr = act.dtype.element_ty
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES * UNITS, UNIT, STEP], gl.NVMMASharedLayout(128, 16, 2))
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 2, 2, HALF, STEP], gl.NVMMASharedLayout(128, 16, 4))
    notes, full, empty = pipeline(1 + 128)  # the weights, and the rows of every thread that copies
    n_blocks: gl.constexpr = (WIDTH + 2 * HALF - 1) // (2 * HALF)
    total = gl.max(tile_ends(counts, E, n_blocks, BLOCK_E, UNITS), 0)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (act, notes, x_tiles, w_tiles, full, empty, act_row, H, WIDTH, gl.constexpr(0), GELU)),
            (_multiply, (act, notes, x_tiles, w_tiles, full, empty, act_row, H, WIDTH, gl.constexpr(1), GELU)),
            (_copy, (x, w, counts, slots, notes, x_tiles, w_tiles, full, empty, total, x_row, E, H, n_blocks, top_k,
                     BLOCK_E, GROUP)),
        ],
        [4, 4], [224, 56],
    )
    # fmt: on


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x [T, H] and weight [E, 2I, H] suit this kernel: as `suits`, and H a multiple of 64."""
    return suits(x, weight) and x.shape[1] % STEP.value == 0


def gate_up_hopper(
    x: Tensor, weight: Tensor, act: Tensor, counts: Tensor, slots: Tensor, top_k: int, gelu: bool, group: int
) -> None:
    """Write `act` as `gate_up` does, for operands that `fits` accepts."""
    halves = weight.unflatten(1, (2, -1))  # [E, 2, I, H]: one tile holds gate and up rows
    source = TensorDescriptor(
        halves, list(halves.shape), descriptor_strides(halves), [1, 2, HALF.value, STEP.value],
        gl.NVMMASharedLayout(128, 16, 4),
    )  # fmt: skip
    experts = len(weight)
    with on(x.device):
        launch(
            _gate_up_hopper, (programs_at_once(x.device),),
            x, source, act, counts, slots, x.stride(0), act.stride(0), E=experts, H=x.shape[1], WIDTH=act.shape[1],
            top_k=top_k, BLOCK_E=max(32, triton.next_power_of_2(experts)), GROUP=group, GELU=gelu, launch_pdl=True,
            num_warps=4,
        )  # fmt: skip
