"""Alignment of slots to experts, against a stable sort."""

import pytest
import torch
from torch import Tensor

from moe_harness.impls.triton.alignment import ONE_LAUNCH, align
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable


def sorted_slots(ids: Tensor, experts: int, expert_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int [3, E] counts, starts and zeros, the routed slots by expert and then by number)."""
    flat = ids.long().flatten()
    if expert_map is not None:
        known = (flat >= 0) & (flat < len(expert_map))
        flat = torch.where(known, expert_map.long()[flat.clamp(0, len(expert_map) - 1)], -1)
    routed = (flat >= 0) & (flat < experts)
    counts = torch.bincount(flat[routed], minlength=experts)
    order = torch.where(routed, flat, experts).argsort(stable=True)[: int(routed.sum())]
    return torch.stack([counts, counts.cumsum(0) - counts, torch.zeros_like(counts)]), order


# The interpreter runs programs one after the other, and knows no histogram: the way beyond ONE_LAUNCH is a GPU's.
EXPERTS = [1, 5, 128, 300] if CUDA else [1, 5, 21]
SIZES = [(1, 1), (3, 2), (33, 8)] + [(ONE_LAUNCH // 8, 8), (ONE_LAUNCH // 4 + 1, 4), (16384, 8)] * CUDA


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("tokens", "top_k"), SIZES)
@pytest.mark.parametrize("kind", ["plain", "masked", "mapped", "one expert", "strided", "int32"])
def test_slots_are_in_expert_order(experts: int, tokens: int, top_k: int, kind: str) -> None:
    draw = torch.Generator().manual_seed(tokens + experts)
    ids = torch.randint(0, experts, (tokens, top_k), generator=draw)
    expert_map = None
    if kind == "masked":  # ids behind the last expert are another rank's, as transformers writes them
        ids = torch.randint(-1, experts + 2, (tokens, top_k), generator=draw)
    if kind == "mapped":
        expert_map = torch.where(torch.arange(experts) % 2 == 0, torch.arange(experts) // 2, -1).to(DEVICE)
    if kind == "one expert":
        ids.fill_(experts - 1)
    if kind == "strided":
        ids = ids.repeat_interleave(3, 1)[:, ::3]
    ids = (ids.int() if kind == "int32" else ids).to(DEVICE)
    local = experts if expert_map is None else (experts + 1) // 2
    counts, slots = align(ids, local, expert_map)
    want_counts, want_slots = sorted_slots(ids, local, expert_map)
    assert torch.equal(counts.long(), want_counts)
    assert torch.equal(slots[: len(want_slots)].long(), want_slots)


def test_no_token_gives_empty_experts() -> None:
    counts, slots = align(torch.empty(0, 4, dtype=torch.int64, device=DEVICE), 3)
    assert not counts.any() and len(slots) == 0
