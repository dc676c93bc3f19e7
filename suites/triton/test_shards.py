"""A token over shards of the vocabulary is the token of the whole row, and ranks with another plan are told."""

import pytest
import torch

from moe_harness.impls.torch.sampler import best_in_shard, inverse_of
from moe_harness.impls.triton.sampler import sampler
from moe_harness.impls.triton.shards import pick, shard_words
from moe_harness.suites.compiled import for_hopper
from moe_harness.suites.triton import DEVICE, runnable

pytestmark = runnable
WIDTH, SHARDS = 213, ((0, 72), (72, 144), (144, 213))
DISAGREE = -2


COMPILE = """
from moe_harness.impls.triton import shards

x, tokens, words = torch.empty(8), torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.int64)
for dtype in (torch.float32, torch.bfloat16):
    given = (x.to(dtype), x, x, tokens, words, words, 64, 75968, 1)
    assert shards._pack.warmup(*given, PARTS=17, BP=32, num_warps=1, grid=(64,)).asm["ptx"]
    given = (words, x.to(dtype), words, 64, 1, -2)
    assert shards._pick.warmup(*given, RANKS=2, BR=2, num_warps=1, grid=(64,)).asm["ptx"]
"""


def test_they_compile_for_hopper() -> None:
    for_hopper(COMPILE)


def drawn(batch: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, WIDTH, generator=random) * 4
    logits[0, SHARDS[1][0] : SHARDS[1][1]] = -torch.inf  # a shard of which nothing is left
    logits[-1] = -torch.inf
    logits[-1, 7] = 3.0
    if batch > 2:
        logits[1, :] = logits[1].round()  # many equal ones
    temperature = torch.tensor([0.0, 0.7, 3.0, 1e-3]).repeat(batch)[:batch]
    given = {
        "temperature": temperature, "seeds": torch.arange(batch) + seed, "positions": torch.arange(batch) * 3 + 1,
    }  # fmt: skip
    return logits.to(DEVICE), {name: value.to(DEVICE) for name, value in given.items()}


def gathered(logits: torch.Tensor, given: dict[str, torch.Tensor], plans: tuple[int, ...]) -> torch.Tensor:
    words = [
        shard_words(logits[:, start:stop], **given, first=start, plan=torch.tensor([plan], device=DEVICE))
        for (start, stop), plan in zip(SHARDS, plans, strict=True)
    ]
    return torch.cat(words)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("seed", range(2))
def test_the_token_is_that_of_the_whole_row(batch: int, seed: int) -> None:
    logits, given = drawn(batch, seed)
    token = pick(gathered(logits, given, (7, 7, 7)), given["temperature"], len(SHARDS), DISAGREE)
    assert token.tolist() == sampler(logits, **given).tolist()


def test_candidates_are_those_of_the_plain_shards() -> None:
    logits, given = drawn(5, 3)
    words = gathered(logits, given, (7, 7, 7)).view(len(SHARDS), -1)
    for (start, stop), own in zip(SHARDS, words, strict=True):
        tops, scores, tokens = best_in_shard(logits[:, start:stop], **given, first=start)
        top, score = own[1:11].view(torch.float64).view(2, 5)
        left = tops > -torch.inf
        assert torch.equal(top, tops.double()) and torch.equal(own[11:][left], tokens[left])
        # Each shard's parts are relative to their own largest logits first: one rounding of a difference each.
        scale = (scores.abs().double() + inverse_of(given["temperature"], torch.float64) * 64)[left]
        assert ((score - scores).abs()[left] <= 4 * torch.finfo(torch.float32).eps * scale).all()


@pytest.mark.parametrize(("plans", "first"), [((7, 8, 7), 1), ((7, 7, 9), 2), ((1, 2, 2), 1)])
def test_a_rank_with_another_plan_is_told(plans: tuple[int, ...], first: int) -> None:
    logits, given = drawn(2, 0)
    token = pick(gathered(logits, given, plans), given["temperature"], len(SHARDS), DISAGREE)
    assert token.tolist() == [DISAGREE - first] * 2
