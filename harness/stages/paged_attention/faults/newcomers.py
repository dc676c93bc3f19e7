"""Mistakes of first kernels of paged attention: its softmax, its mask, its parts and the places that it reads."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.paged_attention.faults._steps import Step, attend, gathered, parts_of, run

CHUNKS = {"queries": "prompt"}
SPLIT = {"size": (16, 8, 32, 64, 128, 256)}  # keys of a part


def scored(q: Tensor, keys: Tensor, visible: Tensor, scale: float, masked: float = -torch.inf) -> Tensor:
    """Scores [n, H, L], those that are not seen replaced."""
    return (torch.einsum("nhd,lhd->nhl", q, keys) * scale).masked_fill(~visible[:, None], masked)


def weighing(weigh: Callable[[Tensor], Tensor], masked: float = -torch.inf) -> Step:
    """`attend` with other weights of the scores than their softmax."""

    def attend_so(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        return torch.einsum("nhl,lhd->nhd", weigh(scored(q, keys, visible, scale, masked)), values)

    return attend_so


def mistaken(join: Callable[[list[tuple]], Tensor], size: int) -> Step:
    """`attend` in parts that `join` puts together."""

    def in_parts(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        return join(parts_of(q, keys, values, visible, scale, size))

    return in_parts


@fault("softmax", shows={"length": 20})
def base_two_without_log2e(*call: Tensor, **options: Any) -> Tensor:
    """Weights are 2^score: exp2 is faster than exp, and the scores were not multiplied by log2(e) first."""
    return run(*call, **options, attend=weighing(lambda scores: (scores * log(2)).softmax(-1)))


@fault("softmax", shows={"length": 20})
def log2e_and_exp(*call: Tensor, **options: Any) -> Tensor:
    """Scores are multiplied by log2(e), and exp is taken of them instead of exp2."""
    return run(*call, **options, attend=weighing(lambda scores: (scores / log(2)).softmax(-1)))


@fault("softmax", condition="a scale that is not 1", shows={"length": 20}, hidden=("scale=1.0",))
def scale_left_out(*call: Tensor, scale: float, **options: Any) -> Tensor:
    """Scores are not scaled."""
    return run(*call, scale=1.0, **options)


@fault("softmax", condition="a scale that is not 1", shows={"length": 20}, hidden=("scale=1.0",))
def scaled_twice_in_attention(*call: Tensor, scale: float, **options: Any) -> Tensor:
    """Queries are scaled, and their scores once more."""
    return run(*call, scale=scale**2, **options)


@fault("softmax", condition="two or more keys", shows={"length": 20})
def weights_not_normalised(*call: Tensor, **options: Any) -> Tensor:
    """The result is not divided by the sum of the weights."""
    return run(*call, **options, attend=weighing(lambda scores: (scores - scores.amax(-1, keepdim=True)).exp()))


@fault("softmax", shows={"length": 20})
def one_added_to_the_sum(*call: Tensor, **options: Any) -> Tensor:
    """A further score of 0 takes its share of the weights, as a sink of attention does."""

    def with_sink(scores: Tensor) -> Tensor:
        return torch.nn.functional.pad(scores, (0, 1)).softmax(-1)[..., :-1]

    return run(*call, **options, attend=weighing(with_sink))


@fault("softmax", condition="scores that are not small", shows={"data": "one_peak"}, variants={"cap": (30.0, 50.0)})
def scores_capped(*call: Tensor, cap: float = 30.0, **options: Any) -> Tensor:
    """Scores go through cap * tanh(score / cap), as in Gemma 2."""

    def capped(scores: Tensor) -> Tensor:
        return torch.where(scores == -torch.inf, scores, cap * (scores / cap).tanh()).softmax(-1)

    return run(*call, **options, attend=weighing(capped))


@fault("causal", condition="a chunk of two or more", shows=CHUNKS, hidden=("queries=decode",),
       variants={"masked": (-10.0, -1.0, -100.0, -1000.0, 0.0)})  # fmt: skip
def mask_of_minus_ten(*call: Tensor, masked: float = -10.0, **options: Any) -> Tensor:
    """Keys that are not seen get a score of -10 in the place of -inf: they keep a share of the weights."""
    return run(*call, **options, attend=weighing(lambda scores: scores.softmax(-1), masked))


@fault("causal", condition="a chunk of two or more", shows=CHUNKS, hidden=("queries=decode",))
def masked_behind_the_softmax(*call: Tensor, **options: Any) -> Tensor:
    """The softmax is over all keys of the sequence; weights of unseen ones are cleared then, and the rest is small."""

    def late(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        weights = scored(q, keys, torch.ones_like(visible), scale).softmax(-1) * visible[:, None]
        return torch.einsum("nhl,lhd->nhd", weights, values)

    return run(*call, **options, attend=late)


@fault("causal", condition="a chunk of two or more", shows=CHUNKS | {"length": 40}, hidden=("queries=decode",),
       variants={"size": (16, 8, 32, 64, 128)})  # fmt: skip
def causal_by_blocks(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """Blocks of keys in front of the query's own are masked or not as wholes, and the query's own is not masked."""

    def blocks(count: int, length: int) -> Tensor:
        return torch.arange(length) // size <= torch.arange(length - count, length)[:, None] // size

    return run(*call, **options, seen=blocks)


@fault("causal", condition="more than 128 keys", shows={"length": 200}, hidden=("length=100",),
       variants={"size": (128, 16, 32, 64, 256, 512, 1024, 4096)})  # fmt: skip
def window_of_128(*call: Tensor, size: int = 128, **options: Any) -> Tensor:
    """Queries see the last 128 keys, as in a layer with a sliding window."""

    def near(count: int, length: int) -> Tensor:
        at = torch.arange(length - count, length)[:, None]
        return (torch.arange(length) <= at) & (torch.arange(length) > at - size)

    return run(*call, **options, seen=near)


@fault("pages", condition="a sequence with page 0 and others", shows={"length": 40})
def page_zero_is_null(*call: Tensor, **options: Any) -> Tensor:
    """Page 0 is taken for a page that is not there, as in pools that keep it free: its keys are not seen."""
    zero: list[Tensor] = []

    def noted(table: Tensor, s: int, length: int, page: int) -> Tensor:
        pages = table[s, : -(-length // page)].long()
        zero[:] = [(pages == 0).repeat_interleave(page)[:length]]
        return pages

    def without(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        return attend(q, keys, values, visible & ~zero[0], scale).nan_to_num(0.0)

    return run(*call, **options, pages_of=noted, attend=without)


@fault("pages", condition="two or more sequences", hidden=("S=1",))
def table_of_the_sequence_before(*call: Tensor, **options: Any) -> Tensor:
    """Every sequence but the first reads the pages of the one before it."""

    def before(table: Tensor, s: int, length: int, page: int) -> Tensor:
        return table[max(0, s - 1), : -(-length // page)].long().clamp(0, len(call[1]) - 1)

    return run(*call, **options, pages_of=before)


@fault("pages", shows={"length": 40})
def pages_one_behind(*call: Tensor, **options: Any) -> Tensor:
    """The table is read one entry too far on: the first page is skipped."""

    def behind(table: Tensor, s: int, length: int, page: int) -> Tensor:
        count = -(-length // page)
        return table[s, (torch.arange(count) + 1).clamp(max=table.shape[1] - 1)].long().clamp(0, len(call[1]) - 1)

    return run(*call, **options, pages_of=behind)


@fault("pages", condition="pages of two or more", shows={"length": 40}, hidden=("page=1",))
def keys_of_a_page_backwards(*call: Tensor, **options: Any) -> Tensor:
    """The values of a page meet the weights of its keys in reverse order."""

    def turned(cache: Tensor, pages: Tensor, length: int) -> Tensor:
        rows = gathered(cache, pages, length)
        if cache.data_ptr() != call[2].data_ptr():
            return rows
        page = cache.shape[1]
        at = torch.arange(length)
        first = at // page * page
        last = (first + page).clamp(max=length) - 1
        return rows[first + last - at]

    return run(*call, **options, gathered=turned)


@fault("heads", condition="two or more key/value heads, more heads than those", shows={"Hq": 6}, hidden=("Hk=1",))
def heads_divided_by_the_key_heads(*call: Tensor, **options: Any) -> Tensor:
    """Query head h takes key/value head h // Hk instead of h // (Hq / Hk)."""
    return run(*call, **options, shared_by=lambda heads, kv: (torch.arange(heads) // kv).clamp(max=kv - 1))


@fault("rows", condition="a chunk of more than 16", shows=CHUNKS | {"length": 40}, hidden=("length=16",),
       variants={"size": (16, 8, 32, 64, 128)})  # fmt: skip
def queries_beyond_the_first_tile_lost(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """A sequence has one tile of queries: those of a chunk behind it stay as zeros."""
    out = run(*call, **options)
    starts = call[4].tolist()
    for start, end in zip(starts, starts[1:], strict=False):
        out[start + size : max(start + size, end)] = 0
    return out


@fault("split", condition="more keys than a part has", shows={"length": 40}, hidden=("length=9",), variants=SPLIT)
def parts_weighted_by_their_maxima(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """Parts that are divided by their sums are joined by exp(maximum) alone: the sums are missing in their weights."""

    def by_maxima(parts: list[tuple]) -> Tensor:
        top = torch.stack([t for _, t, _ in parts]).amax(0)
        factors = [(t - top).exp() for _, t, _ in parts]
        alone = [acc / total.clamp(min=1e-38) for acc, _, total in parts]
        return sum(f * one for f, one in zip(factors, alone, strict=True)) / sum(factors)

    return run(*call, **options, attend=mistaken(by_maxima, size))


def _running(parts: list[tuple], rescaled: bool, sums: bool) -> Tensor:
    """The running result and the running sum, each brought to a new maximum or not."""
    acc, top, total = parts[0]
    for more, of, mass in parts[1:]:
        new = torch.maximum(top, of)
        old, now = ((t - new).exp().nan_to_num(0.0) for t in (top, of))
        acc = acc * (old if rescaled else 1.0) + more * now
        total, top = total * (old if sums else 1.0) + mass * now, new
    return acc / total


@fault("split", condition="a maximum that grows from block to block", shows={"length": 40}, hidden=("length=9",),
       variants=SPLIT)  # fmt: skip
def running_result_not_rescaled(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """Where a block has a larger maximum, the sum of the weights is brought to it and the result so far is not."""
    return run(*call, **options, attend=mistaken(lambda parts: _running(parts, False, True), size))


@fault("split", condition="a maximum that grows from block to block", shows={"length": 40}, hidden=("length=9",),
       variants=SPLIT)  # fmt: skip
def running_sum_not_rescaled(*call: Tensor, size: int = 16, **options: Any) -> Tensor:
    """Where a block has a larger maximum, the result so far is brought to it and the sum of the weights is not."""
    return run(*call, **options, attend=mistaken(lambda parts: _running(parts, True, False), size))


@fault(
    "values", condition="values beyond fp16, which the dtype holds", shows={"dtype": "bf16", "data": "huge_values"},
    hidden=("data=normal", "dtype=fp16"),
)  # fmt: skip
def weighted_values_in_fp16(*call: Tensor, **options: Any) -> Tensor:
    """The sum of the values is stored in fp16 on its way, whatever their dtype is."""
    out = run(*call, **options)
    return out.half().to(out.dtype)
