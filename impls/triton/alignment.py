r"""Alignment of rows to experts: which slots belong to which expert, in expert order.

    slot   = token * top_k + j                                  0 <= slot < S = T * top_k
    counts = how many slots each local expert has, and where they start      int32 [2, E]
    slots  = the slots sorted by expert, ties by slot           int32 [S], the first sum(counts) entries are written

Masked slots (id -1, or an expert that lives elsewhere) appear nowhere.  The order is that of a stable sort, so it is
the same in every run.  There is no padding: the grouped products find their row tiles from `counts`, so nothing has
to be known on the host and the launches can be captured in a CUDA graph.

Up to ONE_LAUNCH slots one program per expert reads all ids; beyond, two launches: histograms of chunks, then each part
of a chunk places its slots from the histograms before it, ranking them by comparing all pairs of the part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from impls.triton._common import after_previous, early_start, let_next_start, on

__all__ = ["align"]

ONE_LAUNCH = 8192


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
    let_next_start(PDL)
    slot = tl.arange(0, BLOCK)
    mine = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    start = tl.sum(((mine >= 0) & (mine < e)).to(tl.int32), 0)
    hit = (mine == e).to(tl.int32)
    rank = tl.cumsum(hit, 0) - 1
    tl.store(slots + start + rank, slot, mask=hit == 1)
    tl.store(counts + e, tl.sum(hit, 0))
    tl.store(counts + E + e, start)


@triton.jit
def _count_chunks(
    ids, emap, table, S, top_k, id_row, id_col, map_len, E,
    HAS_MAP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program c: histogram of chunk c over the experts, one row of `table`; masked slots fall into bin E."""
    chunk = tl.program_id(0)
    slot = chunk * BLOCK + tl.arange(0, BLOCK)
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    bins = tl.histogram(tl.where(e < 0, E, e), BLOCK_E)
    tl.store(table + chunk * BLOCK_E + tl.arange(0, BLOCK_E), bins)


@triton.jit
def _place_chunks(
    ids, emap, table, slots, counts, S, top_k, id_row, id_col, map_len, E, chunks,
    HAS_MAP: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, p): place part p of chunk c behind lower experts, earlier chunks and earlier parts."""
    after_previous(PDL)
    let_next_start(PDL)
    chunk, part = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, chunks, ROWS):
        c = first + tl.arange(0, ROWS)
        rows = tl.load(table + c[:, None] * BLOCK_E + experts[None, :], mask=(c < chunks)[:, None], other=0)
        total += tl.sum(rows, 0)
        before += tl.sum(tl.where((c < chunk)[:, None], rows, 0), 0)
    starts = tl.cumsum(total, 0) - total
    first_program = (experts < E) & (chunk + part == 0)
    tl.store(counts + experts, total, mask=first_program)
    tl.store(counts + E + experts, starts, mask=first_program)
    whole = tl.arange(0, BLOCK)
    slot = chunk * BLOCK + whole
    earlier = (slot < S) & (whole < part * PART)
    e = local_expert(ids, emap, slot, earlier, top_k, id_row, id_col, map_len, E, HAS_MAP)
    before += tl.histogram(tl.where(e < 0, E, e), BLOCK_E)
    free = starts + before  # the next free position of each expert
    lane = tl.arange(0, PART)
    slot = chunk * BLOCK + part * PART + lane
    e = local_expert(ids, emap, slot, slot < S, top_k, id_row, id_col, map_len, E, HAS_MAP)
    binned = tl.where(e < 0, E, e)
    same = (binned[:, None] == binned[None, :]) & (lane[None, :] < lane[:, None])
    tl.store(slots + tl.gather(free, binned, 0) + tl.sum(same.to(tl.int32), 1), slot, mask=e >= 0)


def align(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort the slots of topk_ids [T, k] (int32 or int64, any strides) by local expert.

    Args:
        num_experts: E, the local experts; other ids, and -1, are masked.
        expert_map: int [E_global], global id to local id or -1.

    Returns:
        int32 [2, E], the number of slots of each expert and the position of its first one, and slots int32 [T * k];
        entries of `slots` past the last routed one are not written.
    """
    tokens, top_k = topk_ids.shape
    total = tokens * top_k
    counts = torch.empty(2, num_experts, dtype=torch.int32, device=topk_ids.device)
    slots = torch.empty(total, dtype=torch.int32, device=topk_ids.device)
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
            _align_small[(num_experts,)](
                topk_ids, emap, slots, counts, *shared, HAS_MAP=has_map, BLOCK=block, PDL=early, num_warps=warps
            )
            return counts, slots
        chunk, part = (1024, 128) if total <= 32768 else (2048, 256)
        block_e, chunks = triton.next_power_of_2(num_experts + 1), triton.cdiv(total, chunk)
        table = torch.empty(chunks, block_e, dtype=torch.int32, device=topk_ids.device)
        flags = {"HAS_MAP": has_map, "BLOCK_E": block_e, "BLOCK": chunk}
        _count_chunks[(chunks,)](topk_ids, emap, table, *shared, **flags)
        _place_chunks[(chunks, chunk // part)](
            topk_ids, emap, table, slots, counts, *shared, chunks, **flags,
            PART=part, ROWS=max(1, 4096 // block_e), PDL=early, launch_pdl=early,
            num_warps=part // 32,
        )  # fmt: skip
    return counts, slots
