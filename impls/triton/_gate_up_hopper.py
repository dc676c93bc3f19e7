r"""First product of the experts on Hopper, with one warpgroup that copies and two that multiply.

The same function as `gate_up`, tile for tile: 128 rows by 128 columns of act, which take 128 gate and 128 up rows of
the weights as one product of 256 columns.  The warps that multiply never compute an address nor issue a copy, and the
copies of the next tile run while this one is written.  Triton's own pipeline cannot do that for gathered rows.

Tiles are handed out in order by a counter, not in turn: tiles of few rows take less time, so programs with a fixed
share drift apart, and what two tiles of an expert should share is read from memory twice (4096 tokens: 1.48 GB instead
of 0.9).  Written in Gluon, Triton's language for layouts and barriers; `gate_up` decides where it can run.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from impls.triton._common import descriptor_strides, on, programs_at_once

# Triton 3.6 has both under another name.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

ROWS = gl.constexpr(128)  # of a tile: 64 for each warpgroup that multiplies
COLUMNS = gl.constexpr(128)  # of act in a tile
STEP = gl.constexpr(64)  # 128 bytes, the widest swizzle
STAGES = gl.constexpr(4)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _ends(counts, E, n_blocks, BLOCK_E: gl.constexpr):
    """Number of tiles up to and including each expert, int32 [BLOCK_E], held by every warp."""
    e = gl.arange(0, BLOCK_E, gl.BlockedLayout([BLOCK_E // 32], [32], [gl.num_warps()], [0]))
    rows = gl.load(counts + e, mask=e < E, other=0)
    return gl.associative_scan(gl.cdiv(rows, ROWS) * n_blocks, 0, _add)


@gluon.jit
def _find(tile, counts, ends, E, n_blocks, GROUP: gl.constexpr):
    """Expert, its rows, where they start, and first row and column of `tile`; the order is that of `find_tile`."""
    passed = ends <= tile
    e = gl.sum(passed.to(gl.int32), 0)
    local = tile - gl.max(gl.where(passed, ends, 0), 0)
    count = gl.load(counts + e)
    start = gl.load(counts + E + e)
    above = local // (GROUP * n_blocks) * GROUP
    width = gl.minimum(gl.cdiv(count, ROWS) - above, GROUP)
    inside = local - above * n_blocks
    return e, count, start, (above + inside % width) * ROWS, inside // width * COLUMNS


@gluon.jit
def _after(stage, phase):
    """The stage after `stage`, and the parity of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _row_pointers(x, slots, start, first, count, top_k, x_row):
    """Pointers [64, STEP] to the first columns of the tokens of 64 slots, and which of the rows exist."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    live = row < count
    token = gl.load(slots + start + row, mask=live, other=0) // top_k
    k = gl.arange(0, STEP, gl.SliceLayout(0, layout))
    return x + token.to(gl.int64)[:, None] * x_row + k[None, :], live[:, None]


@gluon.jit
def _copy(
    x, w, counts, slots, counter, tiles, x_tiles, w_tiles, full, empty, E, H, n_blocks, total, top_k, x_row,
    BLOCK_E: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warpgroup that copies: announces a tile, fills its stages, fetches the next; then announces the end."""
    ends = _ends(counts, E, n_blocks, BLOCK_E)
    middle = H // STEP // 2
    stage, phase = 0, 1
    tile = gl.program_id(0)
    while tile < total:
        e, count, start, first, n0 = _find(tile, counts, ends, E, n_blocks, GROUP)
        upper, live_upper = _row_pointers(x, slots, start, first, count, top_k, x_row)
        lower, live_lower = _row_pointers(x, slots, start, first + 64, count, top_k, x_row)
        mbarrier.wait(empty.index(stage), phase)
        tiles.index(stage).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + tile)
        upcoming = total
        for step in range(H // STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * COLUMNS * STEP * 2)
            load_tile(w, [e, 0, n0, step * STEP], bar, w_tiles.index(stage))
            load_rows(x_tiles.index(stage * 2), upper, mask=live_upper)
            if count > first + 64:
                load_rows(x_tiles.index(stage * 2 + 1), lower, mask=live_lower)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            upper += STEP
            lower += STEP
            if step == middle:  # takes a microsecond, while the stages are full
                taken = gl.atomic_add(counter, 1)
                upcoming = taken + gl.num_programs(0)
                if taken == total - 1:  # nobody asks again: leave the counter as it was found
                    gl.store(counter, 0)
            stage, phase = _after(stage, phase)
        tile = upcoming
    mbarrier.wait(empty.index(stage), phase)
    tiles.index(stage).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + total)
    mbarrier.expect(full.index(stage), 0)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _announced(tiles, full, stage, phase):
    """The tile whose first step is in `stage`."""
    mbarrier.wait(full.index(stage), phase)
    return gl.max(tiles.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _gated(g, u, GELU: gl.constexpr):
    """`gated` of _common for results of 16 bits."""
    z = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    small = gl.exp2(gl.abs(z) * -1.4426950408889634)
    return g * (gl.where(z >= 0, 1.0, small) / (1.0 + small)) * u


@gluon.jit
def _multiply(
    act, counts, tiles, x_tiles, w_tiles, full, empty, E, H, WIDTH, n_blocks, total, act_row,
    HALF: gl.constexpr, BLOCK_E: gl.constexpr, GROUP: gl.constexpr, GELU: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies: 64 rows of every tile, the upper or the lower HALF."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    # 16 bytes a thread, and an exchange among the four threads of a row gets there.
    wide: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    ends = _ends(counts, E, n_blocks, BLOCK_E)
    stage, phase = 0, 0
    tile = _announced(tiles, full, stage, phase)
    while tile < total:
        e, count, start, first, n0 = _find(tile, counts, ends, E, n_blocks, GROUP)
        if count > first + HALF * 64:
            acc = gl.zeros([64, 2 * COLUMNS], gl.float32, sums)
            for step in range(H // STEP):
                mbarrier.wait(full.index(stage), phase)
                fence_async_shared()
                w_tile = w_tiles.index(stage).reshape([2 * COLUMNS, STEP])
                acc = warpgroup_mma(x_tiles.index(stage * 2 + HALF), w_tile.permute([1, 0]), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=step > 0)
                stage, phase = _after(stage, phase)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
            g, u = gl.split(gl.permute(gl.reshape(acc, [64, 2, COLUMNS]), [0, 2, 1]))
            out = gl.convert_layout(_gated(g, u, GELU).to(act.dtype.element_ty), wide)
            row = first + HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
            col = n0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, wide))
            at = act + (start + row)[:, None].to(gl.int64) * act_row + col[None, :]
            gl.store(at, out, mask=(row < count)[:, None] & (col < WIDTH)[None, :])
        else:
            for _ in range(H // STEP):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage))
                stage, phase = _after(stage, phase)
        tile = _announced(tiles, full, stage, phase)


@gluon.jit
def _gate_up_hopper(
    x, w, act, counts, slots, E, H, WIDTH, top_k, x_row, act_row,
    BLOCK_E: gl.constexpr, GROUP: gl.constexpr, GELU: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A persistent program; x_tiles hold two halves of 64 rows per stage, w_tiles gate rows before up rows."""
    gl.inline_asm_elementwise(  # `after_previous` and `let_next_start`
        "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    dtype: gl.constexpr = act.dtype.element_ty
    plane: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, STEP], plane)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 2, COLUMNS, STEP], gl.NVMMASharedLayout(128, 16, 4))
    tiles = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1 + 128)  # the weights, and the rows of every thread
        mbarrier.init(empty.index(i), 2)
    n_blocks = gl.cdiv(WIDTH, COLUMNS)
    total = gl.max(_ends(counts, E, n_blocks, BLOCK_E), 0)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (act, counts, tiles, x_tiles, w_tiles, full, empty, E, H, WIDTH, n_blocks, total, act_row,
                         gl.constexpr(0), BLOCK_E, GROUP, GELU)),
            (_multiply, (act, counts, tiles, x_tiles, w_tiles, full, empty, E, H, WIDTH, n_blocks, total, act_row,
                         gl.constexpr(1), BLOCK_E, GROUP, GELU)),
            (_copy, (x, w, counts, slots, counts + 2 * E, tiles, x_tiles, w_tiles, full, empty, E, H, n_blocks, total,
                     top_k, x_row, BLOCK_E, GROUP)),
        ],
        [4, 4], [224, 56],
    )
    # fmt: on


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x [T, H] and weight [E, 2I, H] suit this kernel: 16 bits, H a multiple of 64, E up to 1024 (each warp
    holds the tiles of all experts), both aligned to 16 bytes and contiguous along H."""
    laid_out = descriptor_strides(x) is not None and descriptor_strides(weight) is not None
    return laid_out and x.element_size() == 2 and x.shape[1] % STEP.value == 0 and len(weight) <= 1024


def gate_up_hopper(
    x: Tensor, weight: Tensor, act: Tensor, counts: Tensor, slots: Tensor, top_k: int, gelu: bool, group: int
) -> None:
    """Write `act` as `gate_up` does, for operands that `fits` accepts."""
    halves = weight.unflatten(1, (2, -1))  # [E, 2, I, H]: one tile holds gate and up rows
    source = TensorDescriptor(
        halves, list(halves.shape), descriptor_strides(halves), [1, 2, COLUMNS.value, STEP.value],
        gl.NVMMASharedLayout(128, 16, 4),
    )  # fmt: skip
    experts = len(weight)
    with on(x.device):
        _gate_up_hopper[(programs_at_once(x.device),)](
            x, source, act, counts, slots, experts, x.shape[1], act.shape[1], top_k, x.stride(0), act.stride(0),
            BLOCK_E=max(32, triton.next_power_of_2(experts)), GROUP=group, GELU=gelu, launch_pdl=True, num_warps=4,
        )  # fmt: skip
