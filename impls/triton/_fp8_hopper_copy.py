"""The warps of `_fp8_hopper` that copy: the next tile, its weights through the copy engine, its rows as they lie."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_harness.impls.triton._hopper import (
    STAGES,
    UNIT,
    after,
    announce,
    find_tile,
    load_rows,
    load_tile,
    take,
    tile_ends,
)

RUN = gl.constexpr(128)  # columns of a step, and rows of a block of the weights: what one scale stands over
UNITS = gl.constexpr(2)  # of the highest tile


@gluon.jit
def wait_for_previous():
    """`after_previous` of _common."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _row_pointers(a, slots, row, rows, top_k: gl.constexpr, a_row: gl.constexpr):
    """Pointers [64, RUN] to the first columns of the tokens of 64 slots from `row` on, and which of them exist."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, UNIT, gl.SliceLayout(1, layout))
    at = gl.load(slots + row + i, mask=i < rows, other=0) // top_k
    k = gl.arange(0, RUN, gl.SliceLayout(0, layout))
    return a + at.to(gl.int64)[:, None] * a_row + k[None, :], (i < rows)[:, None]


@gluon.jit
def _load_weights(w, w_tiles, full, e, first, second, step, stage):
    """Ask for both blocks of a step, into `stage`."""
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * RUN * RUN)
    load_tile(w, [e, first, step * RUN], bar, w_tiles.index(stage * 2))
    load_tile(w, [e, second, step * RUN], bar, w_tiles.index(stage * 2 + 1))


@gluon.jit
def _announce_end(notes, full, empty, stage, phase):
    mbarrier.wait(empty.index(stage), phase)
    announce(notes, stage, 0, 0, 0, 0)
    mbarrier.expect(full.index(stage), 0)


@gluon.jit
def copy_gathered(
    a, w, counts, slots, notes, a_tiles, w_tiles, full, empty, total, a_row: gl.constexpr, E: gl.constexpr,
    K: gl.constexpr, N: gl.constexpr, n_blocks: gl.constexpr, top_k: gl.constexpr, BLOCK_E: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The warpgroup that copies: announces a tile, fills its stages, fetches the next; then announces the end."""
    STEPS: gl.constexpr = K // RUN
    ends = tile_ends(counts, E, n_blocks, BLOCK_E, UNITS)
    stage, phase = 0, 1
    tile = gl.program_id(0)
    while tile < total:
        e, row, rows, units, block = find_tile(tile, counts, ends, E, n_blocks, GROUP, UNITS)
        upper, live_upper = _row_pointers(a, slots, row, rows, top_k, a_row)
        lower, live_lower = _row_pointers(a, slots, row + UNIT, rows - UNIT, top_k, a_row)
        mbarrier.wait(empty.index(stage), phase)
        announce(notes, stage, row, rows, units, e * n_blocks + block)
        upcoming = total
        for step in range(STEPS):
            mbarrier.wait(empty.index(stage), phase)
            _load_weights(w, w_tiles, full, e, block * RUN, N + block * RUN, step, stage)
            load_rows(a_tiles.index(stage * UNITS), upper, mask=live_upper)
            if units > 1:
                load_rows(a_tiles.index(stage * UNITS + 1), lower, mask=live_lower)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            upper += RUN
            lower += RUN
            if step == STEPS // 2:  # takes a microsecond, while the stages are full
                upcoming = take(counts + 2 * E, total)
            stage, phase = after(stage, phase)
        tile = upcoming
    _announce_end(notes, full, empty, stage, phase)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def copy(
    a, w, counts, notes, a_tiles, w_tiles, full, empty, total, E: gl.constexpr, K: gl.constexpr, n_blocks: gl.constexpr,
    BLOCK_E: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The same as one warp, for rows that lie one behind the other: through the copy engine, as the weights."""
    STEPS: gl.constexpr = K // RUN
    EARLY: gl.constexpr = min(STAGES, STEPS)  # steps whose weights do not wait for the first product
    ends = tile_ends(counts, E, n_blocks, BLOCK_E, UNITS)
    stage, phase = 0, 1
    tile = gl.program_id(0)
    asked = 0
    if tile < total:
        e, row, rows, units, block = find_tile(tile, counts, ends, E, n_blocks, GROUP, UNITS)
        for step in gl.static_range(EARLY):
            _load_weights(w, w_tiles, full, e, block * 2 * RUN, block * 2 * RUN + RUN, step, step)
        asked = EARLY
    wait_for_previous()
    while tile < total:
        e, row, rows, units, block = find_tile(tile, counts, ends, E, n_blocks, GROUP, UNITS)
        mbarrier.wait(empty.index(stage), phase)
        announce(notes, stage, row, rows, units, e * n_blocks + block)
        upcoming = total
        for step in range(STEPS):
            mbarrier.wait(empty.index(stage), phase)
            if step >= asked:
                _load_weights(w, w_tiles, full, e, block * 2 * RUN, block * 2 * RUN + RUN, step, stage)
            bar = full.index(stage)
            if units > 1:
                mbarrier.expect(bar, 2 * UNIT * RUN)
                load_tile(a, [row, step * RUN], bar, a_tiles.index(stage * UNITS))
                load_tile(a, [row + UNIT, step * RUN], bar, a_tiles.index(stage * UNITS + 1))
            else:
                mbarrier.expect(bar, UNIT * RUN)
                load_tile(a, [row, step * RUN], bar, a_tiles.index(stage * UNITS))
            if step == STEPS // 2:
                upcoming = take(counts + 2 * E + 1, total)
            stage, phase = after(stage, phase)
        asked = 0
        tile = upcoming
    _announce_end(notes, full, empty, stage, phase)
    mbarrier.expect(full.index(stage), 0)
