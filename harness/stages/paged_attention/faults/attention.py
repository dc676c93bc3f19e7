"""Faults of paged attention: right steps, one of them replaced; `shows` and `hidden` name fields of a case."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import read_as_contiguous
from moe_harness.harness.stages.paged_attention.faults._steps import Step, attend, parts_of, run, seen

CHUNKS = {"queries": "prompt"}


@fault("causal", source="GeeeekExplorer/nano-vllm/issues/212", condition="a chunk of two or more", shows=CHUNKS,
       hidden=("queries=decode",))  # fmt: skip
def chunk_sees_its_later_keys(*call: Tensor, **options: Any) -> Tensor:
    """Every query of a chunk sees all keys of the sequence, those behind it too."""
    return run(*call, **options, seen=lambda count, length: torch.ones(count, length, dtype=torch.bool))


@fault("causal", source="jax-ml/jax/issues/24491", condition="a chunk behind earlier keys",
       shows={"queries": "few"}, hidden=("queries=prompt",))  # fmt: skip
def causal_from_the_first_key(*call: Tensor, **options: Any) -> Tensor:
    """The mask is aligned to the start of the keys: query j sees j + 1 of them, however many came before."""
    return run(*call, **options, seen=lambda count, length: torch.arange(length) <= torch.arange(count)[:, None])


@fault("causal", shows={"length": 20})
def own_key_not_seen(*call: Tensor, **options: Any) -> Tensor:
    """A query sees the keys before it and not its own; the first of a prompt sees nothing."""

    def before(count: int, length: int) -> Tensor:
        visible = seen(count, length) & ~torch.eye(length, dtype=torch.bool)[length - count :]
        return visible | (torch.arange(length - count, length) == 0)[:, None] & (torch.arange(length) == 0)

    return run(*call, **options, seen=before)


@fault("causal", condition="a chunk of two or more", shows=CHUNKS, hidden=("queries=decode",))
def chunk_sees_one_key_ahead(*call: Tensor, **options: Any) -> Tensor:
    """Every query sees the key behind its own, as far as there is one."""

    def ahead(count: int, length: int) -> Tensor:
        return torch.arange(length) <= torch.arange(length - count, length)[:, None] + 1

    return run(*call, **options, seen=ahead)


@fault("heads", condition="more query heads than key/value heads, two or more of those", hidden=("Hq=2",))
def heads_dealt_in_turn(*call: Tensor, **options: Any) -> Tensor:
    """Query head h takes key/value head h % Hk instead of h // (Hq / Hk)."""
    return run(*call, **options, shared_by=lambda heads, kv_heads: torch.arange(heads) % kv_heads)


@fault("heads", condition="two or more key/value heads", hidden=("Hk=1",))
def first_key_head_for_all(*call: Tensor, **options: Any) -> Tensor:
    """All query heads take the first key/value head, as in multi-query attention."""
    return run(*call, **options, shared_by=lambda heads, kv_heads: torch.zeros(heads, dtype=torch.int64))


@fault("pages", condition="pages of another size than 16", hidden=("page=16",))
def page_size_assumed(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, *call: Tensor, **options: Any
) -> Tensor:
    """Positions are divided by 16, the page size the kernel was written for."""

    def assuming(cache: Tensor, pages: Tensor, length: int) -> Tensor:
        at = torch.arange(length)
        return cache[pages[(at // 16).clamp(max=len(pages) - 1)], (at % 16).clamp(max=cache.shape[1] - 1)]

    return run(q, key_cache, value_cache, block_table, *call, **options, gathered=assuming)


@fault("pages", condition="pages out of order", shows={"length": 40})
def pages_taken_as_a_run(*call: Tensor, **options: Any) -> Tensor:
    """Only a sequence's first page is looked up; the others are taken to lie behind it."""

    def in_a_row(table: Tensor, s: int, length: int, page: int) -> Tensor:
        count = -(-length // page)
        return (table[s, :1].long() + torch.arange(count)) % max(1, len(call[1]))

    return run(*call, **options, pages_of=in_a_row)


@fault("pages", condition="two or more sequences", hidden=("S=1",))
def table_of_the_first_sequence(*call: Tensor, **options: Any) -> Tensor:
    """Every sequence reads the pages of the first."""

    def first(table: Tensor, s: int, length: int, page: int) -> Tensor:
        count = -(-length // page)
        return table[0, :count].long().clamp(0, len(call[1]) - 1)

    return run(*call, **options, pages_of=first)


@fault("pages", condition="a table with padded rows", shows={"layout": "block_table:padded"}, hidden=("layout=",),
       )  # fmt: skip
def table_stride_assumed(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, *call: Tensor, **options: Any
) -> Tensor:
    """The table's rows are taken to lie one behind the other: a view of a wider table gives other pages."""
    table = read_as_contiguous(block_table).clamp(0, len(key_cache) - 1)
    return run(q, key_cache, value_cache, table, *call, **options)


@fault("pages", condition="a cache that lies head by head", shows={"order": "head"}, hidden=("order=token",))
def cache_strides_assumed(q: Tensor, key_cache: Tensor, value_cache: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Caches are read as if they lay token by token."""
    return run(q, read_as_contiguous(key_cache), read_as_contiguous(value_cache), *call, **options)


@fault("pages", condition="a value cache laid out unlike the key cache", shows={"layout": "value_cache:outer_padded"},
       hidden=("layout=",))  # fmt: skip
def values_have_the_keys_strides(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, *call: Tensor, **options: Any
) -> Tensor:
    """Values are read with the strides of the keys."""
    values = torch.as_strided(value_cache, value_cache.shape, key_cache.stride())
    return run(q, key_cache, values, *call, **options)


@fault("pages")
def keys_for_values(q: Tensor, key_cache: Tensor, value_cache: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The key cache is read twice."""
    return run(q, key_cache, key_cache, *call, **options)


@fault("length", condition="a last page that is not full", shows={"length": 18}, hidden=("page=1",),
       )  # fmt: skip
def whole_last_page_read(*call: Tensor, **options: Any) -> Tensor:
    """Lengths are rounded up to whole pages: what was left in the last one by another request is attended to."""

    def whole(cache: Tensor, pages: Tensor, length: int) -> Tensor:
        return cache[pages].flatten(0, 1)

    def last_rows(count: int, length: int) -> Tensor:
        return torch.ones(count, length, dtype=torch.bool)

    return run(*call, **options, gathered=whole, seen=last_rows)


@fault(
    "length", condition="a last page that is not full, NaN left in it", shows={"length": 18}, hidden=("stale=large",)
)
def stale_values_times_zero(*call: Tensor, **options: Any) -> Tensor:
    """The last page is read whole and masked by weights of 0: a NaN that another request left there is 0 * NaN."""

    def whole(cache: Tensor, pages: Tensor, length: int) -> Tensor:
        return cache[pages].flatten(0, 1)

    def attend_masked(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        return attend(q, keys.nan_to_num(0.0), values, visible, scale)

    lengths = iter(call[5].tolist())
    starts = call[4].tolist()
    counts = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    real = iter([length for length, count in zip(lengths, counts, strict=True) if length and count])

    def masked(count: int, padded: int) -> Tensor:
        length = next(real)
        return torch.nn.functional.pad(seen(count, length), (0, padded - length))

    return run(*call, **options, gathered=whole, seen=masked, attend=attend_masked)


@fault("length", shows={"length": 20})
def last_key_dropped(*call: Tensor, **options: Any) -> Tensor:
    """Lengths are one too small where there are two keys: the newest key is not seen."""

    def short(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        if len(keys) > 1 and len(q) == 1:
            keys, values, visible = keys[:-1], values[:-1], visible[:, :-1]
        return attend(q, keys, values, visible, scale)

    return run(*call, **options, attend=short)


@fault("length", condition="more than 512 keys", shows={"length": 530, "S": 1, "page": 16}, hidden=("length=500",))
def keys_beyond_512_dropped(*call: Tensor, **options: Any) -> Tensor:
    """The loop over blocks has a fixed end."""

    def bounded(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        if len(q) > 1:
            return attend(q, keys, values, visible, scale)
        return attend(q, keys[:512], values[:512], visible[:, :512], scale)

    return run(*call, **options, attend=bounded)


@fault("length", condition="a sequence without keys", shows={"empties": True, "S": 6}, hidden=("empties=0",))
def nan_without_keys(*call: Tensor, **options: Any) -> Tensor:
    """A sequence without keys gives 0 / 0 instead of zeros."""
    return run(*call, **options, empty=float("nan"))


@fault("rows", condition="a sequence of other than one query", shows=CHUNKS, hidden=("queries=decode",))
def one_query_a_sequence_assumed(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Row s is taken for the query of sequence s; further rows are left as zeros."""
    start = torch.arange(len(context_len) + 1).clamp(max=len(q))
    return run(q, key_cache, value_cache, block_table, start, context_len, **options)


@fault("rows", source="pytorch/pytorch/issues/194167", condition="two or more sequences and parts of their keys",
       shows={"length": 40}, hidden=("S=1",))  # fmt: skip
def later_sequences_not_joined(*call: Tensor, **options: Any) -> Tensor:
    """The rows of sequences after the first are never written where keys are split."""
    out = run(*call, **options)
    start, lengths = call[4].tolist(), call[5].tolist()
    for s in range(1, len(lengths)):
        if lengths[s] > 16:
            out[start[s] : start[s + 1]] = float("nan")
    return out


@fault("rows", condition="queries that are a view", shows={"layout": "q:padded"}, hidden=("layout=",))
def query_strides_assumed_in_attention(q: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Queries are read as contiguous."""
    return run(read_as_contiguous(q), *call, **options)


@fault("softmax", condition="a scale that is not 1 / sqrt(D)", shows={"scale": 0.125, "D": 16}, hidden=("scale=0.25",))
def scale_assumed(q: Tensor, *call: Tensor, scale: float, **options: Any) -> Tensor:
    """The scale is taken from the width of a head, whatever is asked for."""
    return run(q, *call, scale=q.shape[-1] ** -0.5, **options)


@fault("softmax", condition="scores beyond 88", shows={"data": "far_scores"}, hidden=("data=normal",))
def largest_score_not_subtracted(*call: Tensor, **options: Any) -> Tensor:
    """Weights are exp(score): inf / inf for large scores, 0 / 0 for very negative ones."""

    def plain(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        weights = (torch.einsum("nhd,lhd->nhl", q, keys) * scale).masked_fill(~visible[:, None], -torch.inf).exp()
        return torch.einsum("nhl,lhd->nhd", weights, values) / weights.sum(-1, keepdim=True)

    return run(*call, **options, attend=plain)


@fault("softmax", condition="scores that are all below 0", shows={"data": "negative_scores"}, hidden=("data=normal",))
def running_maximum_starts_at_0(*call: Tensor, **options: Any) -> Tensor:
    """The running maximum starts at 0 instead of -inf: weights vanish where all scores are far below."""

    def from_zero(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        scores = (torch.einsum("nhd,lhd->nhl", q, keys) * scale).masked_fill(~visible[:, None], -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True).clamp(min=0)).exp()
        return torch.einsum("nhl,lhd->nhd", weights, values) / weights.sum(-1, keepdim=True).clamp(min=1e-38)

    return run(*call, **options, attend=from_zero)


SPLIT = {"size": (16, 8, 32, 64, 128, 256)}  # keys of a part


def _joined(join: Step, size: int = 16) -> Step:
    """`attend` in parts that `join` puts together."""

    def attend_in_parts(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        return join(parts_of(q, keys, values, visible, scale, size))

    return attend_in_parts


@fault("split", condition="more keys than a part has", hidden=("length=9",), variants=SPLIT)
def parts_averaged(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """The parts of a sequence are averaged, whatever weight each has."""

    def mean(parts: list[tuple]) -> Tensor:
        return torch.stack([acc / total.clamp(min=1e-38) for acc, _, total in parts]).mean(0)

    return run(*call, **options, attend=_joined(mean, size))


@fault("split", condition="more keys than a part has", hidden=("length=9",), variants=SPLIT)
def parts_not_rescaled(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """Parts are added without bringing them to one maximum."""

    def added(parts: list[tuple]) -> Tensor:
        return sum(acc for acc, _, _ in parts) / sum(total for _, _, total in parts)

    return run(*call, **options, attend=_joined(added, size))


@fault("split", condition="more keys than two parts have", shows={"length": 60}, hidden=("length=20",))
def last_part_dropped(*call: Tensor, **options: Any) -> Tensor:
    """The number of parts is rounded down."""

    def short(parts: list[tuple]) -> Tensor:
        kept = parts[:-1] if len(parts) > 2 else parts
        top = torch.stack([t for _, t, _ in kept]).amax(0)
        factors = [(t - top).exp() for _, t, _ in kept]
        total = sum(f * m for f, (_, _, m) in zip(factors, kept, strict=True))
        return sum(f * acc for f, (acc, _, _) in zip(factors, kept, strict=True)) / total

    def in_parts(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        whole = attend if len(q) > 1 else _joined(short)
        return whole(q, keys, values, visible, scale)

    return run(*call, **options, attend=in_parts)


@fault("split", source="pegainfer-project/pegainfer/pull/21", condition="a part of which no key is seen", shows=CHUNKS,
       hidden=("queries=decode",))  # fmt: skip
def empty_part_is_nan(*call: Tensor, **options: Any) -> Tensor:
    """A part without a visible key has the maximum -inf, and -inf - -inf is NaN."""

    def joined(parts: list[tuple]) -> Tensor:
        top = torch.stack([t for _, t, _ in parts]).amax(0)
        factors = [torch.where(t == -torch.inf, torch.nan, (t - top).exp()) for _, t, _ in parts]
        total = sum(f * m for f, (_, _, m) in zip(factors, parts, strict=True))
        return sum(f * acc for f, (acc, _, _) in zip(factors, parts, strict=True)) / total

    return run(*call, **options, attend=_joined(joined))


@fault("precision", condition="16 bits", hidden=("dtype=fp32",),
       shows={"S": 3, "length": 70, "queries": "chunk", "Hq": 32, "Hk": 4, "D": 128, "page": 16,
              "dtype": "fp16"})  # fmt: skip
def result_accumulated_in_16_bits(q: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The running result is stored in 16 bits after every block of keys."""

    def rounding(parts: list[tuple]) -> Tensor:
        acc, top, total = parts[0]
        for more, of, mass in parts[1:]:
            new = torch.maximum(top, of)
            a, b = ((t - new).exp().nan_to_num(0.0) for t in (top, of))
            acc, total, top = (acc * a + more * b).to(q.dtype).float(), total * a + mass * b, new
        return acc / total

    def in_blocks(rows: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        return rounding(parts_of(rows, keys, values, visible, scale, size=2))

    return run(q, *call, **options, attend=in_blocks)


@fault("precision", condition="16 bits", shows={"dtype": "bf16", "data": "one_peak", "D": 64}, hidden=("dtype=fp32",))
def scores_in_16_bits(q: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Scores are stored in 16 bits before the softmax, and nothing says so."""

    def short(rows: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        scores = (torch.einsum("nhd,lhd->nhl", rows, keys) * scale).to(q.dtype).float()
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        return torch.einsum("nhl,lhd->nhd", weights, values)

    return run(q, *call, **options, attend=short)


@fault("precision", condition="weights that fp8 cannot tell apart", shows={"length": 130, "page": 16})
def weights_in_8_bits(*call: Tensor, **options: Any) -> Tensor:
    """Softmax weights are stored in fp8 before they meet the values."""

    def coarse(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        scores = (torch.einsum("nhd,lhd->nhl", q, keys) * scale).masked_fill(~visible[:, None], -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        stored = weights.to(torch.float8_e4m3fn).float()
        return torch.einsum("nhl,lhd->nhd", stored, values) / weights.sum(-1, keepdim=True)

    return run(*call, **options, attend=coarse)


@fault("tiles", condition="D not a multiple of 16", shows={"D": 20}, hidden=("D=16",))
def width_tail_of_scores_dropped(*call: Tensor, **options: Any) -> Tensor:
    """The last, partial block of a head's elements does not enter the scores."""

    def floored(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        kept = q.shape[-1] // 16 * 16 or q.shape[-1]
        return attend(q[..., :kept], keys[..., :kept], values, visible, scale)

    return run(*call, **options, attend=floored)


@fault("state", condition="always", sign="inputs")
def queries_scaled_in_place(q: Tensor, *call: Tensor, scale: float) -> Tensor:
    """Queries are scaled where they lie: the caller's are changed."""
    q.mul_(scale)
    return run(q, *call, scale=1.0)
