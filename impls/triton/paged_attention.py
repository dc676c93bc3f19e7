r"""Causal attention over a paged cache: few queries a sequence (decode, split over keys) or many (chunks of prompts).

    out[t] = softmax(scale * q[t] . K[: p + 1]) V[: p + 1]      p the position of token t

A program has one key/value head and the BM rows of a tile: (query, query head) for all query heads that share it, so
that keys are read once for them all.  It walks over blocks of BN keys with the running maximum and sum of the softmax
(Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; FlashAttention), in fp32; the weights are rounded to the
dtype of the values before they are multiplied with them.

With few queries a sequence's blocks are dealt to several programs.  How many is decided from its length on the device,
so that a CUDA graph serves every length; a sequence that takes one writes its result at once, the partial results of
the others are joined by a second kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    interpreting,
    let_next_start,
    narrow,
    on,
    product,
    programs_at_once,
    require,
)

__all__ = ["paged_attention"]  # what is registered


LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """How a call is tiled."""

    rows: int  # BM: queries times the heads that share a key
    keys: int  # BN: keys, or rows of a latent cache, at a time
    splits: int  # most programs that share the keys of a sequence; 1 for tiles of queries
    least: int  # blocks of keys for which a further program pays
    warps: int
    stages: int


@triton.jit
def _share(length, splits, least, BN: tl.constexpr):
    """(blocks of keys for each program, programs that have any) for a sequence of `length` keys."""
    blocks = (length + BN - 1) // BN
    programs = tl.minimum(tl.maximum(blocks // least, 1), splits)
    each = tl.maximum((blocks + programs - 1) // programs, 1)
    return each, tl.maximum((blocks + each - 1) // each, 1)


@triton.jit
def _walk(
    q_tile, key_cache, value_cache, pages, low, high, last, depth, kc_p, kc_s, kc_d, vc_p, vc_s, vc_d, scale_log2,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(unnormalised sum [BM, BD], largest score, sum of weights [BM]) over keys low to high; row r sees to last[r]."""
    top = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    lane = tl.arange(0, BN)
    for start in range(low, high, BN):
        key = start + lane
        valid = key < high
        if PAGE % BN == 0:
            page = tl.load(pages + start // PAGE).to(tl.int64)
            k_at = key_cache + page * kc_p + (start % PAGE + lane)[None, :].to(tl.int64) * kc_s
            v_at = value_cache + page * vc_p + (start % PAGE + lane)[:, None].to(tl.int64) * vc_s
        else:
            page = tl.load(pages + key // PAGE, mask=valid, other=0).to(tl.int64)
            k_at = key_cache + (page * kc_p + (key % PAGE).to(tl.int64) * kc_s)[None, :]
            v_at = value_cache + (page * vc_p + (key % PAGE).to(tl.int64) * vc_s)[:, None]
        k = tl.load(k_at + depth[:, None] * kc_d, mask=valid[None, :] & (depth < D)[:, None], other=0.0)
        score = product(q_tile, k, tl.zeros([BM, BN], tl.float32), WIDEN) * scale_log2
        score = tl.where(valid[None, :] & (key[None, :] <= last[:, None]), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(top - shift)
        mass = mass * fade + tl.sum(weight, 1)
        v = tl.load(v_at + depth[None, :] * vc_d, mask=valid[:, None] & (depth < D)[None, :], other=0.0)
        acc = product(narrow(weight, v.dtype, WIDEN), v, acc * fade[:, None], WIDEN)
        top = new_top
    return acc, top, mass


@triton.jit
def _decode(
    q, key_cache, value_cache, table, query_start, context_len, out, part, part_top, part_mass,
    splits, least, scale_log2,
    q_t, q_h, q_d, kc_p, kc_s, kc_h, kc_d, vc_p, vc_s, vc_h, vc_d, table_s, start_s, len_s,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Key/value head program_id(0) of sequence program_id(1), part program_id(2) of its keys; few queries."""
    if not AHEAD:
        after_previous(PDL)
        let_next_start(PDL)
    head, s, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(query_start + s * start_s).to(tl.int64)
    count = (tl.load(query_start + (s + 1) * start_s) - first).to(tl.int32)
    length = tl.load(context_len + s * len_s).to(tl.int32)
    each, used = _share(length, splits, least, BN)
    if AHEAD:
        after_previous(PDL)
        let_next_start(PDL)
    if split < used:
        low = split * each * BN
        high = tl.minimum(length, low + each * BN)
        row = tl.arange(0, BM)
        depth = tl.arange(0, BD).to(tl.int64)
        heads = head * GROUP + row % GROUP
        for base in range(0, count, BM // GROUP):
            query = base + row // GROUP
            live = (row < (BM // GROUP) * GROUP) & (query < count)
            token = first + query
            here = live[:, None] & (depth < D)[None, :]
            q_tile = tl.load(
                q + token[:, None] * q_t + heads[:, None] * q_h + depth[None, :] * q_d, mask=here, other=0.0
            )
            acc, top, mass = _walk(
                q_tile, key_cache + head * kc_h, value_cache + head * vc_h, table + s * table_s, low, high,
                length - count + query, depth, kc_p, kc_s, kc_d, vc_p, vc_s, vc_d, scale_log2,
                BM, BN, BD, D, PAGE, WIDEN,
            )  # fmt: skip
            at = token * HEADS * GROUP + heads
            if used == 1:
                result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
                tl.store(out + at[:, None] * D + depth[None, :], narrow(result, out.dtype.element_ty, WIDEN), mask=here)
            else:
                tl.store(part_top + at * splits + split, top, mask=live)
                tl.store(part_mass + at * splits + split, mass, mask=live)
                tl.store(part + (at * splits + split)[:, None] * D + depth[None, :], acc, mask=here)


@triton.jit
def _join(
    part, part_top, part_mass, query_start, context_len, out, least, start_s, len_s,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Query head program_id(0) of sequence program_id(1), from the parts that its programs left."""
    head, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(query_start + s * start_s).to(tl.int64)
    stop = tl.load(query_start + (s + 1) * start_s).to(tl.int64)
    _, used = _share(tl.load(context_len + s * len_s).to(tl.int32), SPLITS, least, BN)
    after_previous(PDL)
    if used > 1:
        split = tl.arange(0, SPLITS)
        depth = tl.arange(0, BD)
        for token in range(first, stop):
            at = (token * HEADS + head).to(tl.int64)
            top = tl.load(part_top + at * SPLITS + split, mask=split < used, other=float("-inf"))
            mass = tl.load(part_mass + at * SPLITS + split, mask=split < used, other=0.0)
            here = (split < used)[:, None] & (depth < D)[None, :]
            parts = tl.load(part + (at * SPLITS + split)[:, None] * D + depth[None, :], mask=here, other=0.0)
            highest = tl.max(top, 0)
            share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
            total = tl.sum(share * mass, 0)
            result = tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)
            tl.store(out + at * D + depth, narrow(result, out.dtype.element_ty, WIDEN), mask=depth < D)


@triton.jit
def tile_of_queries(tile, query_start, start_s, sequences, BQ: tl.constexpr):
    """(sequence, its first query, how many it has, first of the tile's BQ among them) of a tile.

    Sequence s has tiles from query_start[s] // BQ + s on, so that no table of tiles is needed; some have no query.
    """
    s, beyond = tile * 0, sequences  # a number of the device, with one sequence too
    while beyond - s > 1:
        middle = (s + beyond) // 2
        reached = (tl.load(query_start + middle.to(tl.int64) * start_s) // BQ + middle) <= tile
        s = tl.where(reached, middle, s)
        beyond = tl.where(reached, beyond, middle)
    s = s.to(tl.int64)
    first = tl.load(query_start + s * start_s).to(tl.int64)
    count = (tl.load(query_start + (s + 1) * start_s) - first).to(tl.int32)
    return s, first, count, (tile - (first // BQ + s)).to(tl.int32) * BQ


@triton.jit
def _extend(
    q, key_cache, value_cache, table, query_start, context_len, out, sequences, scale_log2,
    q_t, q_h, q_d, kc_p, kc_s, kc_h, kc_d, vc_p, vc_s, vc_h, vc_d, table_s, start_s, len_s,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Key/value head program_id(0), tile program_id(1) of BM // GROUP queries of one sequence."""
    BQ: tl.constexpr = BM // GROUP
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, first, count, base = tile_of_queries(tile, query_start, start_s, sequences, BQ)
    if base < count:
        length = tl.load(context_len + s * len_s).to(tl.int32)
        row = tl.arange(0, BM)
        depth = tl.arange(0, BD).to(tl.int64)
        query = base + row // GROUP
        live = (row < BQ * GROUP) & (query < count)
        token = first + query
        heads = head * GROUP + row % GROUP
        here = live[:, None] & (depth < D)[None, :]
        q_tile = tl.load(q + token[:, None] * q_t + heads[:, None] * q_h + depth[None, :] * q_d, mask=here, other=0.0)
        high = tl.maximum(tl.minimum(length, length - count + base + BQ), 0)
        acc, _, mass = _walk(
            q_tile, key_cache + head * kc_h, value_cache + head * vc_h, table + s * table_s, 0, high,
            length - count + query, depth, kc_p, kc_s, kc_d, vc_p, vc_s, vc_d, scale_log2, BM, BN, BD, D, PAGE, WIDEN,
        )  # fmt: skip
        result = acc / tl.where(mass > 0, mass, 1.0)[:, None]
        at = out + (token * HEADS * GROUP + heads)[:, None] * D + depth[None, :]
        tl.store(at, narrow(result, out.dtype.element_ty, WIDEN), mask=here)


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *,
    scale: float,
) -> Tensor:  # fmt: skip
    """The stage `paged_attention`.

    Lengths stay on the device.  A call with no more queries than sequences is taken for decode, any other for chunks;
    either kernel is right for both.

    Args:
        q: [T, Hq, D], fp32, fp16 or bf16, any strides.
        key_cache, value_cache: [P, page, Hk, D], same dtype, any strides.
        block_table: int [S, M], unit stride along M; entries past a sequence's length are not looked at.
        query_start: int [S + 1]; context_len: int [S].

    Returns:
        New contiguous [T, Hq, D]; zeros where no key is seen.  Rows that belong to no sequence are left undefined.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    table = block_table if block_table.ndim != 2 or block_table.stride(1) == 1 else block_table.contiguous()
    return _attend((q, key_cache, value_cache, table, query_start, context_len), scale, False)


def paged_attention_of_step(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, *,
    scale: float,
) -> Tensor:  # fmt: skip
    """`paged_attention` where lengths were written before the kernel that precedes this one in the stream had started.

    They are read before that one has ended.
    """
    return _attend((q, key_cache, value_cache, block_table, query_start, context_len), scale, True)


@Repeated
def _attend(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, table: Tensor, query_start: Tensor, context_len: Tensor,
    scale: float, ahead: bool,
) -> Tensor:  # fmt: skip
    """`paged_attention` with every argument by position."""
    require(q, key_cache, value_cache)
    _check(q, key_cache, value_cache, table, query_start, context_len)
    out = empty(q, *q.shape)
    if q.numel() > 0 and len(context_len) > 0:
        call = (q, key_cache, value_cache, table, query_start, context_len, out)
        with on(q.device):
            if len(q) <= len(context_len):
                _run_decode(*call, scale=scale, config=decode_config(q, key_cache, table), ahead=ahead)
            else:
                _run_extend(*call, scale=scale, config=extend_config(q, key_cache))
    return out


paged_attention.rounds = ("probability",)
paged_attention.deterministic = True
paged_attention.graph_capturable = True


def decode_config(q: Tensor, key_cache: Tensor, block_table: Tensor) -> Config:
    """Tiling of a call with few queries a sequence; it depends on shapes alone, so that a graph stays right.

    Measured with pages of 32, 32/4 heads of 128 in bf16, contexts of 200 to 1,500 (NOTES.md).  Blocks of 32 keys with
    six on their way are best at every size.  From 512 programs on, only sequences over 2,048 keys are split, for
    balance; with fewer, sequences are split until there are two programs a multiprocessor.
    """
    group = q.shape[1] // key_cache.shape[2]
    rows = max(16, triton.next_power_of_2(group))
    if interpreting():
        return Config(rows, 16, 4, 1, 4, 1)
    programs = len(block_table) * key_cache.shape[2]
    key_bytes = q.shape[2] * q.element_size()  # which limit how many blocks fit in shared memory
    stages = 6 if key_bytes <= 256 else 3 if key_bytes <= 512 else 2
    if programs >= 512:
        config = Config(rows, 32, 16, 64, 2, stages)
    else:
        wanted = max(1, 2 * programs_at_once(q.device) // programs)
        splits = max(4, 1 << (wanted.bit_length() - 1))
        config = Config(rows, 32, min(splits, 64), 1 if programs <= 8 else 2 if programs <= 64 else 4, 2, stages)
    longest = triton.cdiv(block_table.shape[1] * key_cache.shape[1], config.keys * config.least)
    return config._replace(splits=min(config.splits, triton.next_power_of_2(max(1, longest))))


def extend_config(q: Tensor, key_cache: Tensor) -> Config:
    """Tiling of a call with chunks of prompts; measured as above, with chunks of 128 to 2,048 tokens."""
    group = triton.next_power_of_2(q.shape[1] // key_cache.shape[2])
    if interpreting():
        return Config(max(16, group), 16, 1, 1, 4, 1)
    if q.dtype == torch.float32 or q.shape[2] > 128:
        return Config(max(32, group), 32, 1, 1, 4, 2)
    keys, stages = (64, 3) if key_cache.shape[1] % 64 == 0 else (32, 2)
    return Config(max(64, group), keys, 1, 1, 4, stages)


def _strides(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: Tensor, length: Tensor) -> tuple[int, ...]:
    return (*q.stride(), *keys.stride(), *values.stride(), table.stride(0), start.stride(0), length.stride(0))


def _run_decode(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: Tensor, length: Tensor, out: Tensor, *,
    scale: float, config: Config, ahead: bool,
) -> None:  # fmt: skip
    tokens, query_heads, width = q.shape
    heads, sequences = keys.shape[2], len(length)
    splits = config.splits
    early = early_start(q.device)
    part = empty(q, tokens, query_heads, splits, width if splits > 1 else 0, dtype=torch.float32)
    top, mass = (empty(q, tokens, query_heads, splits, dtype=torch.float32) for _ in range(2))
    launch(
        _decode, (heads, sequences, splits),
        q, keys, values, table, start, length, out, part, top, mass, splits, config.least, scale * LOG2_E,
        *_strides(q, keys, values, table, start, length),
        HEADS=heads, GROUP=query_heads // heads, D=width, BD=max(16, triton.next_power_of_2(width)),
        PAGE=keys.shape[1], BM=config.rows, BN=config.keys, AHEAD=ahead, WIDEN=interpreting(), PDL=early,
        launch_pdl=early,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            _join, (query_heads, sequences),
            part, top, mass, start, length, out, config.least, start.stride(0), length.stride(0),
            HEADS=query_heads, D=width, BD=triton.next_power_of_2(width), BN=config.keys, SPLITS=splits,
            WIDEN=interpreting(), PDL=early, launch_pdl=early, num_warps=1 if splits <= 8 else 4,
        )  # fmt: skip


def _run_extend(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: Tensor, length: Tensor, out: Tensor, *,
    scale: float, config: Config,
) -> None:  # fmt: skip
    tokens, query_heads, width = q.shape
    heads, sequences = keys.shape[2], len(length)
    tiles = tokens // (config.rows // (query_heads // heads)) + sequences
    launch(
        _extend, (heads, tiles),
        q, keys, values, table, start, length, out, sequences, scale * LOG2_E,
        *_strides(q, keys, values, table, start, length),
        HEADS=heads, GROUP=query_heads // heads, D=width, BD=max(16, triton.next_power_of_2(width)),
        PAGE=keys.shape[1], BM=config.rows, BN=config.keys, WIDEN=interpreting(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _check(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, start: Tensor, length: Tensor) -> None:
    """Refuse shapes that do not fit together."""
    width, heads, sequences = q.shape[2], keys.shape[2], len(length)
    if heads == 0 or q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads do not share {heads} key/value heads evenly")
    fitting = {
        "key_cache": (keys, (*keys.shape[:3], width)), "value_cache": (values, tuple(keys.shape)),
        "block_table": (table, (sequences, table.shape[-1])), "query_start": (start, (sequences + 1,)),
    }  # fmt: skip
    require_shapes(q, fitting)


def require_shapes(q: Tensor, fitting: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """ValueError that names the first of these tensors whose shape is not the one beside it."""
    for name, (tensor, shape) in fitting.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape} beside q of {tuple(q.shape)}")
