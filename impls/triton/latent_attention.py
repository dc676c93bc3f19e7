r"""Causal attention over pages of compressed keys and values (MLA, https://arxiv.org/abs/2405.04434, absorbed).

    out[t] = softmax(scale * q[t] . C[: p + 1]) C[: p + 1, : rank]      p the position of token t

All query heads share one row C[s] of a position, whose first `rank` numbers are its value too: a block of rows is
loaded once and multiplied twice.  A program has the BM rows of a tile, (query, query head), and walks over blocks of BN
rows of the cache with the running maximum and sum of the softmax in fp32, as in `paged_attention`, from which the
dealing of a sequence's blocks to several programs and the joining of their results come.

The tilings are reckoned, not measured: no GPU has run this yet.  Compiled for an H100 by Triton 3.6, rank 512 and 64
turned dimensions in bf16: decoding takes 236 registers of 4 warps and 37 KiB (with blocks of 32 rows it spills), chunks
250 of 8 warps and 144 KiB; neither spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.triton._common import interpreting, narrow, on, product, programs_at_once, require
from moe_harness.impls.triton.paged_attention import LOG2_E, Config, _join, _share, require_shapes, tile_of_queries

__all__ = ["latent_attention"]

HEADS = 16  # of one tile at most; a tensor core multiplies no fewer rows
KEYS, LEAST = 16, 4  # rows of the cache at a time, and such blocks for which a further program pays


@triton.jit
def _walk(
    latent, turned, cache, pages, low, high, last, depth, angle, c_p, c_s, c_d, scale_log2,
    RANK: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PAGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(unnormalised sum [BM, BR], largest score, sum of weights [BM]) over keys low to high; row r sees to last[r]."""
    top = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BR], tl.float32)
    lane = tl.arange(0, BN)
    for start in range(low, high, BN):
        key = start + lane
        valid = key < high
        page = tl.load(pages + key // PAGE, mask=valid, other=0).to(tl.int64)
        at = cache + page * c_p + (key % PAGE).to(tl.int64) * c_s
        c = tl.load(at[:, None] + depth[None, :] * c_d, mask=valid[:, None] & (depth < RANK)[None, :], other=0.0)
        k = tl.load(
            at[None, :] + (RANK + angle)[:, None] * c_d, mask=valid[None, :] & (angle < TURNED)[:, None], other=0.0
        )
        score = product(latent, tl.trans(c), tl.zeros([BM, BN], tl.float32), WIDEN)
        score = product(turned, k, score, WIDEN) * scale_log2
        score = tl.where(valid[None, :] & (key[None, :] <= last[:, None]), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(top - shift)
        mass = mass * fade + tl.sum(weight, 1)
        acc = product(narrow(weight, c.dtype, WIDEN), c, acc * fade[:, None], WIDEN)
        top = new_top
    return acc, top, mass


@triton.jit
def _tile(
    q, cache, pages, out, part, part_top, part_mass, first, count, length, base, block, split, low, high, used, splits,
    scale_log2, q_t, q_h, q_d, c_p, c_s, c_d,
    HEADS: tl.constexpr, BH: tl.constexpr, RANK: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Queries `base` on of a sequence, heads `block` * BH on, over keys low to high: the result, or a part of it."""
    row = tl.arange(0, BM)
    depth = tl.arange(0, BR).to(tl.int64)
    angle = tl.arange(0, BT).to(tl.int64)
    query, head = base + row // BH, block * BH + row % BH
    live = (query < count) & (head < HEADS)
    token = first + query
    from_q = q + token[:, None] * q_t + head[:, None] * q_h
    here = live[:, None] & (depth < RANK)[None, :]
    latent = tl.load(from_q + depth[None, :] * q_d, mask=here, other=0.0)
    turned = tl.load(from_q + (RANK + angle)[None, :] * q_d, mask=live[:, None] & (angle < TURNED)[None, :], other=0.0)
    acc, top, mass = _walk(
        latent, turned, cache, pages, low, high, length - count + query, depth, angle, c_p, c_s, c_d, scale_log2,
        RANK, TURNED, BM, BN, BR, PAGE, WIDEN,
    )  # fmt: skip
    at = token * HEADS + head
    if used == 1:
        result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
        tl.store(out + at[:, None] * RANK + depth[None, :], narrow(result, out.dtype.element_ty, WIDEN), mask=here)
    else:
        tl.store(part_top + at * splits + split, top, mask=live)
        tl.store(part_mass + at * splits + split, mass, mask=live)
        tl.store(part + (at * splits + split)[:, None] * RANK + depth[None, :], acc, mask=here)


@triton.jit
def _decode(
    q, cache, table, query_start, context_len, out, part, part_top, part_mass, splits, least, scale_log2,
    q_t, q_h, q_d, c_p, c_s, c_d, table_s, start_s, len_s,
    HEADS: tl.constexpr, BH: tl.constexpr, RANK: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Block of heads program_id(0) of sequence program_id(1), part program_id(2) of its keys; few queries."""
    block, s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(query_start + s * start_s).to(tl.int64)
    count = (tl.load(query_start + (s + 1) * start_s) - first).to(tl.int32)
    length = tl.load(context_len + s * len_s).to(tl.int32)
    each, used = _share(length, splits, least, BN)
    if split < used:
        low = split * each * BN
        high = tl.minimum(length, low + each * BN)
        for base in range(0, count, BM // BH):
            _tile(
                q, cache, table + s * table_s, out, part, part_top, part_mass, first, count, length, base, block, split,
                low, high, used, splits, scale_log2, q_t, q_h, q_d, c_p, c_s, c_d,
                HEADS, BH, RANK, TURNED, BM, BN, BR, BT, PAGE, WIDEN,
            )  # fmt: skip


@triton.jit
def _extend(
    q, cache, table, query_start, context_len, out, sequences, scale_log2,
    q_t, q_h, q_d, c_p, c_s, c_d, table_s, start_s, len_s,
    HEADS: tl.constexpr, BH: tl.constexpr, RANK: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Block of heads program_id(0), tile program_id(1) of BM // BH queries of one sequence."""
    BQ: tl.constexpr = BM // BH
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, first, count, base = tile_of_queries(tile, query_start, start_s, sequences, BQ)
    if base < count:
        length = tl.load(context_len + s * len_s).to(tl.int32)
        high = tl.maximum(tl.minimum(length, length - count + base + BQ), 0)
        _tile(
            q, cache, table + s * table_s, out, out, out, out, first, count, length, base, block, 0, 0, high, 1, 1,
            scale_log2, q_t, q_h, q_d, c_p, c_s, c_d, HEADS, BH, RANK, TURNED, BM, BN, BR, BT, PAGE, WIDEN,
        )  # fmt: skip


def latent_attention(
    q: Tensor, cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *, scale: float, rank: int
) -> Tensor:
    """The weighted sum of latents of every query head.  Lengths stay on the device.

    Args:
        q: [T, Hq, W], fp32, fp16 or bf16, any strides: the query in the latent space beside its turned part.
        cache: [P, page, 1, W], same dtype, any strides; W = rank + turned dimensions.
        block_table: int [S, M]; query_start: int [S + 1]; context_len: int [S], as in the stage `paged_attention`.

    Returns:
        New contiguous [T, Hq, rank]; zeros where no key is seen.  Rows that belong to no sequence are left undefined.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(q, cache)
    _check(q, cache, block_table, query_start, context_len, rank)
    out = torch.empty(*q.shape[:2], rank, dtype=q.dtype, device=q.device)
    if out.numel() > 0 and len(context_len) > 0:
        table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        with on(q.device):
            run = _run_decode if len(q) <= len(context_len) else _run_extend
            run(q, cache, table, query_start, context_len, out, scale * LOG2_E)
    return out


latent_attention.deterministic = True
latent_attention.graph_capturable = True


def decode_config(q: Tensor, block_table: Tensor, page: int) -> Config:
    """Tiling of a call with few queries a sequence; it depends on shapes alone, so that a graph stays right.

    Two programs fit on a multiprocessor; sequences are split until all have work.
    """
    if interpreting():
        return Config(HEADS, 16, 4, 1, 4, 1)
    programs = len(block_table) * triton.cdiv(q.shape[1], HEADS)
    splits = 1 << max(0, (2 * programs_at_once(q.device) // programs).bit_length() - 1)
    longest = triton.cdiv(block_table.shape[1] * page, KEYS * LEAST)
    splits = min(splits, 32, triton.next_power_of_2(max(1, longest)))
    return Config(HEADS, KEYS, splits, LEAST, 4, 2 if q.dtype == torch.float32 else 3)


def extend_config(q: Tensor) -> Config:
    """Tiling of a call with chunks of prompts."""
    if interpreting() or q.dtype == torch.float32:
        return Config(HEADS, 16, 1, 1, 4, 1)
    return Config(4 * HEADS, 32, 1, 1, 8, 2)


def _shape(q: Tensor, cache: Tensor, rank: int, config: Config) -> dict[str, int | bool]:
    """What a kernel is compiled for."""
    turned = q.shape[2] - rank
    return {
        "HEADS": q.shape[1], "BH": min(HEADS, triton.next_power_of_2(q.shape[1])), "RANK": rank, "TURNED": turned,
        "BM": config.rows, "BN": config.keys, "BR": max(16, triton.next_power_of_2(rank)),
        "BT": max(16, triton.next_power_of_2(turned)), "PAGE": cache.shape[1], "WIDEN": interpreting(),
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _strides(q: Tensor, cache: Tensor, table: Tensor, start: Tensor, length: Tensor) -> tuple[int, ...]:
    pages, slots, _, width = cache.stride()
    return (*q.stride(), pages, slots, width, table.stride(0), start.stride(0), length.stride(0))


def _run_decode(
    q: Tensor, cache: Tensor, table: Tensor, start: Tensor, length: Tensor, out: Tensor, scale_log2: float
) -> None:
    config = decode_config(q, table, cache.shape[1])
    (tokens, heads, rank), sequences, splits = out.shape, len(length), config.splits
    part = q.new_empty(tokens, heads, splits, rank if splits > 1 else 0, dtype=torch.float32)
    top, mass = q.new_empty(2, tokens, heads, splits, dtype=torch.float32)
    shape = _shape(q, cache, rank, config)
    _decode[(triton.cdiv(heads, shape["BH"]), sequences, splits)](
        q, cache, table, start, length, out, part, top, mass, splits, config.least, scale_log2,
        *_strides(q, cache, table, start, length), **shape,
    )  # fmt: skip
    if splits > 1:
        _join[(heads, sequences)](
            part, top, mass, start, length, out, config.least, start.stride(0), length.stride(0),
            HEADS=heads, D=rank, BD=triton.next_power_of_2(rank), BN=config.keys, SPLITS=splits, WIDEN=interpreting(),
            PDL=False, num_warps=8 if splits > 8 else 4,
        )  # fmt: skip


def _run_extend(
    q: Tensor, cache: Tensor, table: Tensor, start: Tensor, length: Tensor, out: Tensor, scale_log2: float
) -> None:
    config = extend_config(q)
    shape = _shape(q, cache, out.shape[2], config)
    tiles = len(q) // (config.rows // shape["BH"]) + len(length)
    _extend[(triton.cdiv(q.shape[1], shape["BH"]), tiles)](
        q, cache, table, start, length, out, len(length), scale_log2, *_strides(q, cache, table, start, length), **shape
    )


def _check(q: Tensor, cache: Tensor, table: Tensor, start: Tensor, length: Tensor, rank: int) -> None:
    """Refuse shapes that do not fit together."""
    width, sequences = q.shape[2], len(length)
    if not 0 < rank < width:
        raise ValueError(f"rank is {rank}, but should be below the {width} numbers of a query")
    fitting = {
        "cache": (cache, (*cache.shape[:2], 1, width)), "block_table": (table, (sequences, table.shape[-1])),
        "query_start": (start, (sequences + 1,)),
    }  # fmt: skip
    require_shapes(q, fitting)
