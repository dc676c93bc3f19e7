r"""Alignment of rows to experts: which slots belong to which expert, in expert order.

    slot   = token * top_k + j                                  0 <= slot < S = T * top_k
    counts = how many slots each local expert has, where they start, zeros   int32 [3, E]
    slots  = the slots sorted by expert, ties by slot           int32 [S], the first sum(counts) entries are written

Masked slots (id -1, or an expert that lives elsewhere) appear nowhere.  The order is that of a stable sort, so it is
the same in every run.  There is no padding: the grouped products find their row tiles from `counts`, so nothing has
to be known on the host and the launches can be captured in a CUDA graph.

Up to ONE_LAUNCH slots one program per expert reads all ids.  Beyond, three launches over parts of the slots, one warp
each: count the slots of each expert in a part, sum the counts of the parts before, place the slots, ranking those of a
part by comparing all its pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._common import after_previous, early_start, let_next_start, on

__all__ = ["align"]

ONE_LAUNCH = 4096
COLUMNS = 4  # experts of one program that sums up parts


@triton.jit
def local_expert(ids, emap, slot, mask, top_k, id_row, id_col, map_len, E, HAS_MAP: tl.constexpr):
    """Local expert of each slot, int32, -1 where the slot is masked or its expert lives elsewhere."""
    token = slot // top_k
    column = slot - token * top_k
    e = tl.load(ids + token.to(tl.int64) * id_row + column.to(tl.int64) * id_col, mask=mask, other=-1)
    if HAS_MAP:
        e = tl.load(emap + e, mask=mask & (e >= 0) & (e < map_len), other=-1)
    return tl.where(mask & (e >= 0) & (e < E), e, -1).to(tl.int32)


@triton.jit
def _align_small(
    ids,
    emap,
    slots,
    counts,
    S,
    top_k,
    id_row,
    id_col,
    map_len,
    E,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e: its first position is the number of slots of lower experts; its slots follow in order."""
    e = tl.program_id(0)
    after_previous(PDL)
    let_next_start(PDL)
    slot = tl.arange(0, BLOCK)
    mine = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    start = tl.sum(((mine >= 0) & (mine < e)).to(tl.int32), 0)
    hit = (mine == e).to(tl.int32)
    rank = tl.cumsum(hit, 0) - 1
    tl.store(slots + start + rank, slot, mask=hit == 1)
    tl.store(counts + e, tl.sum(hit, 0))
    tl.store(counts + E + e, start)
    tl.store(counts + 2 * E + e, 0)


@triton.jit
def _count_parts(
    ids, emap, table, S, top_k, id_row, id_col, map_len, E,
    HAS_MAP: tl.constexpr, BLOCK_E: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p: how many slots of part p each expert has, one row of `table`."""
    let_next_start(PDL)
    part = tl.program_id(0)
    slot = part * PART + tl.arange(0, PART)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    bins = tl.histogram(tl.maximum(e, 0), BLOCK_E, mask=e >= 0)
    tl.store(table + part.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), bins)


@triton.jit
def _sum_parts(
    table, counts, E, parts, BLOCK_E: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):
    """Program c: replace each count of COLUMNS experts by the sum of those above it; their totals go to `counts`."""
    after_previous(PDL)
    let_next_start(PDL)
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)
        at = table + part[:, None].to(tl.int64) * BLOCK_E + e[None, :]
        inside = (part < parts)[:, None]
        bins = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(bins, 0) - bins, mask=inside)
        total += tl.sum(bins, 0)
    tl.store(counts + e, total, mask=e < E)


@triton.jit
def _place_parts(
    ids, emap, table, slots, counts, S, top_k, id_row, id_col, map_len, E,
    HAS_MAP: tl.constexpr, BLOCK_E: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p: the slots of part p go behind those of lower experts and those of earlier parts."""
    part = tl.program_id(0)
    lane = tl.arange(0, PART)
    slot = part * PART + lane
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    earlier = (e[:, None] == e[None, :]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    after_previous(PDL)
    let_next_start(PDL)
    experts = tl.arange(0, BLOCK_E)
    total = tl.load(counts + experts, mask=experts < E, other=0)
    starts = tl.cumsum(total, 0) - total
    mine = experts + part * BLOCK_E < E  # the first program only
    tl.store(counts + E + experts, starts, mask=mine)
    tl.store(counts + 2 * E + experts, 0, mask=mine)
    free = starts + tl.load(table + part.to(tl.int64) * BLOCK_E + experts)
    tl.store(slots + tl.gather(free, tl.maximum(e, 0), 0) + rank, slot, mask=e >= 0)


def align(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort the slots of topk_ids [T, k] (int32 or int64, any strides) by local expert.

    Args:
        num_experts: E, the local experts; other ids, and -1, are masked.
        expert_map: int [E_global], global id to local id or -1.

    Returns:
        counts int32 [3, E], of each expert the number of its slots, the position of the first one, and a zero: kernels
        may count in there, and leave zeros; and slots int32 [T * k], not written past the last routed one.
    """
    tokens, top_k = topk_ids.shape
    total = tokens * top_k
    counts, slots = empty(topk_ids, 3, num_experts, dtype=torch.int32), empty(topk_ids, total, dtype=torch.int32)
    emap = topk_ids if expert_map is None else expert_map.contiguous()
    row, column = topk_ids.stride()
    if row == top_k * column:  # rows without gaps are one long row: no division, wide loads
        top_k, row = 1, column
    shared = (total, top_k, row, column, emap.numel(), num_experts)
    has_map = expert_map is not None
    early = early_start(topk_ids.device)
    with on(topk_ids.device):
        if total <= ONE_LAUNCH:
            block = max(16, triton.next_power_of_2(total))
            warps = min(16, max(1, block // 256))
            launch(
                _align_small, (num_experts,), topk_ids, emap, slots, counts, *shared,
                HAS_MAP=has_map, BLOCK=block, PDL=early, launch_pdl=early, num_warps=warps,
            )  # fmt: skip
            return counts, slots
        part = 64 if total <= 32768 else 128
        parts, block_e = triton.cdiv(total, part), max(COLUMNS, triton.next_power_of_2(num_experts))
        table = empty(topk_ids, parts, block_e, dtype=torch.int32)
        flags = {"HAS_MAP": has_map, "BLOCK_E": block_e, "PART": part, "PDL": early, "num_warps": 1}
        launch(_count_parts, (parts,), topk_ids, emap, table, *shared, **flags)
        launch(
            _sum_parts, (block_e // COLUMNS,), table, counts, num_experts, parts, BLOCK_E=block_e, COLUMNS=COLUMNS,
            ROWS=min(1024, triton.next_power_of_2(parts)), PDL=early, launch_pdl=early, num_warps=8,
        )  # fmt: skip
        launch(_place_parts, (parts,), topk_ids, emap, table, slots, counts, *shared, **flags, launch_pdl=early)
    return counts, slots
