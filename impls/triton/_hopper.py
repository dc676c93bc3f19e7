"""What the grouped products for Hopper share: one warpgroup copies, two multiply; which tile is whose; the pipeline.

A tile is up to UNITS times 64 rows of one expert by 256 rows of its weights.  Each of the two warpgroups multiplies one
unit by all columns and, where there is a third unit, that one by half of them: a product of 64 rows costs the same
whoever does it, and an expert with 257 to 384 rows has its weights read twice instead of three times.

Tiles are handed out in order by a counter, not in turn: tiles of few rows take less time, so programs with a fixed
share drift apart, and what two tiles of an expert should share is read from memory twice (4096 tokens: 1.48 GB instead
of 0.9).  Only the warps that copy look a tile up, which takes two loads from memory in a row; they leave what the
others need beside the tile's first stage.

Written in Gluon, Triton's language for layouts and barriers.
"""

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

from moe_harness.impls.triton._common import descriptor_strides

# Triton 3.6 has both under another name.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

UNIT = gl.constexpr(64)  # rows of one product
UNITS = gl.constexpr(3)  # of the highest tile
COLUMNS = gl.constexpr(256)  # rows of the weights in a tile
STEP = gl.constexpr(64)  # 128 bytes, the widest swizzle
STAGES = gl.constexpr(4)


def suits(rows: Tensor, weight: Tensor) -> bool:
    """Whether rows [S, K] and weight [E, N, K] suit these kernels: 16 bits, E up to 1024 (each warp that copies holds
    the tiles of all experts), both aligned to 16 bytes and contiguous along K."""
    laid_out = descriptor_strides(rows) is not None and descriptor_strides(weight) is not None
    return laid_out and rows.element_size() == 2 and len(weight) <= 1024


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def tile_ends(counts, E: gl.constexpr, n_blocks: gl.constexpr, BLOCK_E: gl.constexpr, MOST: gl.constexpr):
    """Number of tiles, of up to MOST units, up to and including each expert, int32 [BLOCK_E], held by every warp."""
    e = gl.arange(0, BLOCK_E, gl.BlockedLayout([BLOCK_E // 32], [32], [gl.num_warps()], [0]))
    rows = gl.load(counts + e, mask=e < E, other=0)
    return gl.associative_scan(gl.cdiv(gl.cdiv(rows, UNIT), MOST) * n_blocks, 0, add)


@gluon.jit
def find_tile(tile, counts, ends, E: gl.constexpr, n_blocks: gl.constexpr, GROUP: gl.constexpr, MOST: gl.constexpr):
    """Expert of `tile`, its first row among all rows, rows of the expert from there on, units of the tile, and column
    block; the order is that of `_tiles.find_tile`, units are spread evenly over the tiles of an expert, up to MOST in
    each."""
    passed = ends <= tile
    e = gl.sum(passed.to(gl.int32), 0)
    local = tile - gl.max(gl.where(passed, ends, 0), 0)
    count = gl.load(counts + e)
    start = gl.load(counts + E + e)
    units = gl.cdiv(count, UNIT)
    tiles = gl.cdiv(units, MOST)
    above = local // (GROUP * n_blocks) * GROUP
    width = gl.minimum(tiles - above, GROUP)
    inside = local - above * n_blocks
    m = above + inside % width
    low, higher = units // tiles, units % tiles  # the first `higher` tiles have one unit more
    first = (m * low + gl.minimum(m, higher)) * UNIT
    return e, start + first, count - first, low + (m < higher).to(gl.int32), inside // width


@gluon.jit
def after(stage, phase):
    """The stage after `stage`, and the parity of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def take(counter, total):
    """The next tile for this program, and whoever takes the last one leaves the counter as it was found."""
    taken = gl.atomic_add(counter, 1)
    if taken == total - 1:
        gl.store(counter, 0)
    return taken + gl.num_programs(0)


@gluon.jit
def announce(notes, stage, row, rows, units, block):
    """Leave what the multiplying warps need to know of the tile that starts in `stage`; no units: there is none."""
    i = gl.arange(0, 4, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    notes.index(stage).store(gl.where(i == 0, row, gl.where(i == 1, rows, gl.where(i == 2, units, block))))


@gluon.jit
def announced(notes, full, stage, phase):
    """What was announced with `stage`, once its first step is there: row, rows, units, block."""
    mbarrier.wait(full.index(stage), phase)
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    note = notes.index(stage).load(layout)
    i = gl.arange(0, 4, layout)
    return (
        gl.sum(gl.where(i == 0, note, 0), 0), gl.sum(gl.where(i == 1, note, 0), 0),
        gl.sum(gl.where(i == 2, note, 0), 0), gl.sum(gl.where(i == 3, note, 0), 0),
    )  # fmt: skip


@gluon.jit
def pipeline(WRITERS: gl.constexpr):
    """Notes and barriers of all stages: WRITERS threads arrive at `full`, both multiplying warpgroups at `empty`."""
    notes = gl.allocate_shared_memory(gl.int32, [STAGES, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), WRITERS)
        mbarrier.init(empty.index(i), 2)
    return notes, full, empty


@gluon.jit
def multiply(
    rows, weights, full, empty, stage, phase, STEPS: gl.constexpr, WHICH: gl.constexpr, THIRD: gl.constexpr,
    FENCE: gl.constexpr,
):  # fmt: skip
    """Unit WHICH of a tile by all columns [64, 256] and, with THIRD, the third unit by half WHICH of them [64, 128];
    the stage and parity behind the tile.

    FENCE: rows were written by threads, not by the copy engine.
    """
    acc = gl.zeros([UNIT, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
    more = gl.zeros([UNIT, COLUMNS // 2], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
    for step in range(STEPS):
        mbarrier.wait(full.index(stage), phase)
        if FENCE:
            fence_async_shared()
        w = weights.index(stage).reshape([COLUMNS, STEP])
        acc = warpgroup_mma(rows.index(stage * UNITS + WHICH), w.permute([1, 0]), acc, is_async=True)
        if THIRD:
            half = w.slice(WHICH * (COLUMNS // 2), COLUMNS // 2, 0)
            more = warpgroup_mma(rows.index(stage * UNITS + 2), half.permute([1, 0]), more, is_async=True)
            acc, more = warpgroup_mma_wait(2, deps=[acc, more])
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=step > 0)
        stage, phase = after(stage, phase)
    acc, more = warpgroup_mma_wait(0, deps=[acc, more])
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
    return acc, more, stage, phase


@gluon.jit
def pass_by(full, empty, stage, phase, STEPS: gl.constexpr):
    """Leave a tile to the other warpgroup: the stage and parity behind it."""
    for _ in range(STEPS):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage))
        stage, phase = after(stage, phase)
    return stage, phase
