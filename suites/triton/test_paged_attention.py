"""Decoding attention over sequences of any lengths: how their keys are dealt to programs changes no value.

Lengths beside each other that are cut into one, some and many programs; none; two queries in one sequence and none in
another; what no sequence holds is NaN.
"""

import pytest
import torch

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.paged_attention.bound import attention
from moe_harness.impls.triton.paged_attention import paged_attention
from moe_harness.suites.triton import DEVICE, runnable

pytestmark = runnable
PAGE, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 16
BATCHES = {
    "alone": ([1], [5]),
    "one long": ([1, 1, 1, 1, 1], [150, 3, 17, 64, 48]),
    "the long one last": ([1, 1, 1], [10, 1, 200]),
    "equal": ([1] * 20, [16] * 20),
    "without keys": ([1, 1, 1, 1], [0, 90, 0, 33]),
    "other numbers of queries": ([3, 1, 0, 0], [90, 33, 50, 2]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_results_are_within_the_bound(name: str) -> None:
    queries, lengths = BATCHES[name]
    draw = torch.Generator().manual_seed(len(name))
    pages = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(pages) + 2, generator=draw).int()
    table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    cache = torch.full((2, len(order), PAGE, KV_HEADS, WIDTH), float("nan"))
    kept, rest = [], order
    for s, (count, length) in enumerate(zip(pages, lengths, strict=True)):
        table[s, :count], rest = rest[:count], rest[count:]
        rows = torch.full((2, count * PAGE, KV_HEADS, WIDTH), float("nan"))
        rows[:, :length] = torch.randn(2, length, KV_HEADS, WIDTH, generator=draw)
        cache[:, table[s, :count].long()] = rows.unflatten(1, (count, PAGE))
        kept.append(rows[:, :length])
    q = torch.randn(sum(queries), HEADS, WIDTH, generator=draw)
    start = torch.tensor([0, *queries]).cumsum(0).int()
    given = (t.to(DEVICE) for t in (q, *cache, table, start, torch.tensor(lengths).int()))
    out = paged_attention(*given, scale=0.25).cpu()
    for s, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        rows = slice(int(start[s]), int(start[s]) + count)
        if not length:
            assert not out[rows].any(), "a sequence without keys gives zeros"
        elif count:
            keys, values = kept[s].double().repeat_interleave(HEADS // KV_HEADS, 2)
            visible = torch.arange(length) <= torch.arange(length - count, length)[:, None]
            value, variance, *_ = attention(
                q[rows].double(), keys, values, visible, scale=0.25, rounds=bounds.permitted(paged_attention.rounds),
                dtype=torch.float32,
            )  # fmt: skip
            z = (out[rows].double() - value) / bounds.finish(value, variance, torch.float32).sqrt()
            assert z.abs().nan_to_num(float("inf")).max() <= bounds.max_limit()
