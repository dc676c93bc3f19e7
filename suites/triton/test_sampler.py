"""Triton's sampler and torch's have the same random numbers, so that they draw the same tokens."""

from types import ModuleType

import pytest
import torch

from moe_harness.impls.torch import sampler as in_torch
from moe_harness.impls.triton import sampler as in_triton
from moe_harness.suites.triton import CUDA, DEVICE, runnable

ROWS, WIDTH = (256, 151936) if CUDA else (6, 203)
# Philox4x32-10 of a counter and a key of zeros: the known answer of Random123.
KNOWN = {
    (0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
}


@pytest.mark.parametrize("place", KNOWN)
def test_random_bits_are_those_of_philox(place: tuple[int, int, int]) -> None:
    seed, position, block = place
    bits = in_torch.random_bits(torch.tensor([seed]), torch.tensor([position]), 4 * block + 4)[0, 4 * block :]
    assert tuple(bits.tolist()) == KNOWN[place]


@pytest.mark.parametrize("cuts", [(), ("top_k",), ("top_p",), ("top_k", "top_p")], ids=["all", "k", "p", "both"])
class TestDraws:
    pytestmark = runnable

    def test_both_draw_the_same_tokens(self, cuts: tuple[str, ...]) -> None:
        """Equal but where two scores agree within 5e-6, what a quick logarithm may be off: one draw in 100,000."""
        random = torch.Generator().manual_seed(0)
        logits = (torch.randn(ROWS, WIDTH, generator=random) * 2).to(DEVICE, torch.bfloat16)
        logits[1, ::3] = -torch.inf
        row = torch.arange(ROWS, device=DEVICE)
        options = {
            "temperature": torch.tensor([1.0, 0.7, 1.3, 0.0, 0.5, 0.01], device=DEVICE)[row % 6],
            "top_k": torch.tensor([5, 0, 7, 3, WIDTH, 1], device=DEVICE)[row % 6],
            "top_p": torch.tensor([1.0, 0.8, 0.9, 0.1, 0.5, 0.0], device=DEVICE)[row % 6],
        }
        options = {k: v for k, v in options.items() if k in ("temperature", *cuts)}
        call = options | {"seeds": row * 991 - 5, "positions": row.int()}
        assert torch.equal(in_triton.sampler(logits, **call), in_torch.sampler(logits, **call))


class TestShards:
    pytestmark = runnable

    @pytest.mark.parametrize("library", [in_torch, in_triton], ids=["torch", "triton"])
    def test_the_best_of_all_shards_is_the_token_of_the_row(self, library: ModuleType) -> None:
        """Whatever the shards are, one without a finite logit too: the noise is that of the token's own number."""
        random = torch.Generator().manual_seed(1)
        logits = (torch.randn(ROWS, WIDTH, generator=random) * 2).to(DEVICE)
        third = WIDTH // 3 // 4 * 4
        logits[1, third : 2 * third] = -torch.inf
        row = torch.arange(ROWS, device=DEVICE)
        call = {
            "temperature": torch.tensor([1.0, 0.7, 1.3, 0.0, 0.5, 0.01], device=DEVICE)[row % 6],
            "seeds": row * 991 - 5, "positions": row.int(),
        }  # fmt: skip
        shards = [library.best_in_shard(logits[:, first:last], **call, first=first)
                  for first, last in ((0, third), (third, 2 * third), (2 * third, WIDTH))]  # fmt: skip
        tops, scores, tokens = (torch.stack(parts) for parts in zip(*shards, strict=True))
        relative = scores + (tops - tops.amax(0)) * in_torch.inverse_of(call["temperature"], torch.float32)
        best = relative.masked_fill(tops == -torch.inf, -torch.inf).argmax(0)
        assert torch.equal(tokens.gather(0, best[None])[0], library.sampler(logits, **call).long())
