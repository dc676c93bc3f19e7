"""Latent attention of both libraries within the bound of the stage `paged_attention`: its values are parts of its keys.

Decoding and chunks, lengths around pages and blocks, sequences without keys, more heads than a tile has, ranks that are
no power of two; what no sequence holds is NaN.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.paged_attention.bound import attention
from moe_harness.impls.torch.latent_attention import latent_attention as plain
from moe_harness.impls.triton.latent_attention import latent_attention as kernel
from moe_harness.suites.triton import DEVICE, runnable

pytestmark = runnable
PAGE = 4
# Queries and keys of each sequence; heads, rank, turned dimensions.
BATCHES = {
    "decode": ([1, 1, 1, 1, 1], [1, 17, 0, 70, 16], 4, 32, 8),
    "decode, two blocks of heads": ([1, 1], [33, 5], 20, 24, 8),
    "chunks": ([5, 0, 1, 9], [5, 3, 18, 31], 4, 32, 8),
    "chunks, one head": ([7, 2], [19, 2], 1, 16, 16),
}
Call = tuple[tuple[Tensor, ...], dict]


def call(name: str, dtype: torch.dtype) -> tuple[Call, list[int], list[int]]:
    queries, keys, heads, rank, turned = BATCHES[name]
    draw = torch.Generator().manual_seed(len(name))
    pages = [-(-length // PAGE) for length in keys]
    order = torch.randperm(sum(pages) + 3, generator=draw).int()
    table = torch.full((len(keys), max(pages) + 1), -1, dtype=torch.int32)
    cache = torch.full((len(order), PAGE, 1, rank + turned), float("nan"))
    taken = 0
    for s, (count, length) in enumerate(zip(pages, keys, strict=True)):
        table[s, :count] = order[taken : taken + count]
        rows = torch.full((count * PAGE, 1, rank + turned), float("nan"))
        rows[:length] = torch.randn(length, 1, rank + turned, generator=draw)
        cache[table[s, :count].long()] = rows.unflatten(0, (count, PAGE))
        taken += count
    q = torch.randn(sum(queries), heads, rank + turned, generator=draw)
    start = torch.tensor([0, *queries]).cumsum(0).int()
    given = (q.to(dtype), cache.to(dtype), table, start, torch.tensor(keys).int())
    return (tuple(t.to(DEVICE) for t in given), {"scale": 0.3, "rank": rank}), queries, keys


def worst(function: Callable[..., Tensor], name: str, dtype: torch.dtype, change: Callable[..., Call] | None) -> float:
    """The largest |z| of a call, after `change` of what the function is given."""
    right, queries, keys = call(name, dtype)
    given, options = right if change is None else change(*right)
    out = function(*given, **options).cpu()
    (q, cache, table, start, _), rank = (t.cpu() for t in right[0]), right[1]["rank"]
    assert out.shape == (*q.shape[:2], rank)
    found = [0.0]
    for s, (count, length) in enumerate(zip(queries, keys, strict=True)):
        rows = slice(int(start[s]), int(start[s]) + count)
        if not length:
            assert not out[rows].any(), "a sequence without keys gives zeros"
            continue
        held = cache[table[s, : -(-length // PAGE)].long()].flatten(0, 1)[:length].double()
        held = held.expand(-1, q.shape[1], -1)
        visible = torch.arange(length) <= torch.arange(length - count, length)[:, None]
        value, variance, *_ = attention(
            q[rows].double(), held, held[..., :rank], visible,
            scale=0.3, rounds=bounds.permitted(("probability",)), dtype=dtype,
        )  # fmt: skip
        z = (out[rows].double() - value) / bounds.finish(value, variance, dtype).sqrt()
        found += [float(z.abs().nan_to_num(float("inf")).max())] if count else []
    return max(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def test_results_are_within_the_bound(batch: str, dtype: torch.dtype) -> None:
    for function in (kernel, plain):
        assert worst(function, batch, dtype, None) <= bounds.max_limit()


def without_turned(given: tuple[Tensor, ...], options: dict) -> Call:
    q = given[0].clone()
    q[..., options["rank"] :] = 0
    return (q, *given[1:]), options


FAULTS: dict[str, Callable[..., Call]] = {
    "another scale": lambda given, options: (given, options | {"scale": 0.29}),
    "a key too few": lambda given, options: ((*given[:4], (given[4] - 1).clamp(min=0)), options),
    "pages in another order": lambda given, options: ((*given[:2], given[2].roll(1, 0), *given[3:]), options),
    "turned part left out": without_turned,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_sees_a_fault(fault: str) -> None:
    """On the plain function, which tells what comes of it fastest."""
    change = FAULTS[fault]
    for batch in ("decode, two blocks of heads", "chunks, one head"):
        assert worst(plain, batch, torch.bfloat16, change) > bounds.max_limit()
