"""The data of a case are what its id says: else a fault that shows on such data alone passes."""

import pytest
import torch
from torch import Tensor

from moe_harness.harness.stages.dispatcher.cases import OWNERS, ROUTINGS, DispatcherCase
from moe_harness.harness.stages.dispatcher.data import build, tagged_token

CASE = DispatcherCase(R=3, E=7, k=3, T="20+0+13")


def routed(case: DispatcherCase) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and ids of all ranks."""
    hidden, weights, ids = zip(*build(case).batches, strict=True)
    return torch.cat(hidden), torch.cat(weights), torch.cat(ids)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_ids_are_of_the_kind_that_the_case_names(routing: str) -> None:
    hidden, weights, ids = routed(CASE.but(ids=routing))
    twice = (ids[:, -1] == ids[:, 0]) & (ids[:, 0] >= 0)
    masked = float((ids < 0).double().mean())
    assert bool(twice.all()) is (routing == "duplicates") and bool(twice.any()) is (routing == "duplicates")
    assert bool((ids[:, 0] == 6).all()) is (routing == "hot") and bool((ids[:, 1:] < 6).all()) is (
        routing in ("hot", "none")
    )
    assert {"none": masked == 1, "masked": 0.25 < masked < 0.55, "hot": 0 < masked < 0.2}.get(routing, masked == 0)
    assert int(hidden.isnan().any(1).sum()) == (routing == "nan")
    assert torch.equal(weights.isnan(), ids < 0), "what a masked slot weighs must not matter"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_each_token_spells_its_number_and_weighs_its_slots_differently(dtype: str) -> None:
    hidden, weights, _ = routed(CASE.but(dtype=dtype))
    assert [tagged_token(row) for row in hidden] == list(range(33))
    assert all(len(set(row)) == 3 for row in weights.tolist())
    half = hidden.half().to(hidden.dtype)
    assert bool((half == hidden).all()) is (dtype == "fp16"), "a row that goes through fp16 shows"


@pytest.mark.parametrize("owner", OWNERS)
def test_every_expert_has_an_owner_of_the_kind_that_the_case_names(owner: str) -> None:
    placed = build(CASE.but(owner=owner)).owner.tolist()
    assert len(placed) == 7 and set(placed) <= {0, 1, 2}
    wanted = {
        "block": [0, 0, 0, 1, 1, 2, 2], "cyclic": [0, 1, 2, 0, 1, 2, 0], "last_empty": [0, 1, 0, 1, 0, 1, 0],
        "one": [1] * 7,
    }  # fmt: skip
    assert placed == wanted.get(owner, placed)


def test_copies_hold_every_expert_at_least_once() -> None:
    world = build(CASE.but(copies=5))
    assert world.has_copies and len(world.logical) == len(world.owner) == 12
    assert set(world.logical.tolist()) == set(range(7)) and world.logical.tolist()[:7] != list(range(7))
    assert not build(CASE).has_copies


def test_other_values_leave_ids_and_experts_as_they_are() -> None:
    one, other = build(CASE), build(CASE, values=1)
    for a, b in zip(one.batches, other.batches, strict=True):
        assert torch.equal(a.topk_ids, b.topk_ids)
    assert not torch.equal(one.batches[0].hidden_states, other.batches[0].hidden_states)
    rows = one.batches[0].hidden_states
    assert all(torch.equal(one.expert(expert, rows), other.expert(expert, rows)) for expert in range(7))
