"""The global-view references: every scheme equals the dense layer, and the algebra refuses illegal sums."""

import pytest
import torch

from moe_harness.reference import dispatcher as reference
from moe_harness.reference.dispatcher import Batch
from moe_harness.reference.reduction import IllegalPlacement, Partial, Replicated, Sharded, reduction

RANKS, EXPERTS, HIDDEN = 3, 5, 6


def _batches(replicated: bool) -> list[Batch]:
    random = torch.Generator().manual_seed(3)
    batches = []
    for tokens in [3] if replicated else [0, 4, 2]:
        ids = torch.randint(-1, EXPERTS, (tokens, 2), generator=random)
        hidden = torch.randint(-9, 10, (tokens, HIDDEN), generator=random).double()
        batches.append(Batch(hidden, torch.randint(1, 9, ids.shape, generator=random).double(), ids))
    return batches * RANKS if replicated else batches


def _expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
    return (expert + 2) * rows.roll(expert, 1) + expert


@pytest.mark.parametrize("scheme", reference.SCHEMES)
@pytest.mark.parametrize("owner", [[0, 2, 2, 0, 2], [0, 0, 0, 0, 0], [0, 1, 2, 1, 0]])
def test_every_scheme_is_the_dense_layer(scheme: str, owner: list[int]) -> None:
    placed, batches = torch.tensor(owner), _batches(scheme == "local_allreduce")
    received = reference.dispatch(scheme, batches, placed)
    outputs = [reference.run_experts(rows, placed, rank, _expert) for rank, rows in enumerate(received)]
    for batch, out in zip(batches, reference.combine(scheme, outputs, received, batches), strict=True):
        assert torch.equal(out, reference.dense(batch, _expert))


def test_copies_and_tokens_are_counted() -> None:
    batches, owner = _batches(False), torch.tensor([0, 2, 2, 0, 2])
    slots = sum(int((batch.topk_ids >= 0).sum()) for batch in batches)
    assert sum(len(rows.hidden_states) for rows in reference.dispatch("all_to_all", batches, owner)) == slots
    masked = reference.dispatch("masked", batches, owner)
    assert sum(int((rows.source_token >= 0).sum()) for rows in masked) == slots


def test_distinct_tokens_are_no_replicated_batch() -> None:
    with pytest.raises(ValueError, match="the same tokens"):
        reference.dispatch("local_allreduce", _batches(False), torch.tensor([0, 2, 2, 0, 2]))


@pytest.mark.parametrize("field", Batch._fields)
def test_one_other_value_is_no_replicated_batch(field: str) -> None:
    batches, owner = _batches(True), torch.tensor([0, 2, 2, 0, 2])
    other = getattr(batches[2], field).clone()
    other[0, 0] += 1
    assert len(reference.dispatch("local_allreduce", batches, owner)) == RANKS
    with pytest.raises(ValueError, match="the same tokens"):
        reference.dispatch("local_allreduce", [*batches[:2], batches[2]._replace(**{field: other})], owner)


def test_a_run_holds_as_many_rows_as_it_is_given_and_no_more() -> None:
    batches, owner = _batches(False), torch.tensor([0, 0, 1, 1, 2])
    most = max(sum(int((batch.topk_ids == expert).sum()) for batch in batches) for expert in range(EXPERTS))
    received = reference.dispatch("masked", batches, owner, capacity=most)
    assert [len(rows.source_token) for rows in received] == [2 * most, 2 * most, most]
    with pytest.raises(ValueError, match=f"gets {most} rows, but has {most - 1} slots"):
        reference.dispatch("masked", batches, owner, capacity=most - 1)


def _values(count: int = 2) -> list[torch.Tensor]:
    return [torch.arange(4.0).view(2, 2) + rank for rank in range(count)]


def test_partial_plus_replicated_is_refused() -> None:
    partial, replicated = Partial.of(_values()), Replicated.of([_values()[0]] * 2)
    with pytest.raises(IllegalPlacement, match=r"Partial \+ Replicated"):
        partial + replicated
    with pytest.raises(IllegalPlacement):
        replicated.all_reduce()
    with pytest.raises(IllegalPlacement):
        partial.map(torch.sigmoid)
    with pytest.raises(IllegalPlacement):
        Replicated.of(_values())
    assert torch.equal(partial.scaled(2.0).all_reduce().value(), 2 * sum(_values()))


@pytest.mark.parametrize("sizes", [None, (1, 1), (2, 0)])
@pytest.mark.parametrize("shared_partial", [True, False])
@pytest.mark.parametrize("routed_sharded", [True, False])
def test_the_one_reduction(sizes: tuple[int, ...] | None, shared_partial: bool, routed_sharded: bool) -> None:
    parts = _values()
    shared = Partial.of([p * 3 for p in parts]) if shared_partial else Replicated.of([parts[1]] * 2)
    total = sum(parts)
    routed = Sharded.of(total.split([1, 1])) if routed_sharded else Partial.of(parts)
    if routed_sharded and sizes is not None:
        pytest.skip("a combined result is on its rows already")
    assert torch.equal(reduction(routed, shared, sizes=sizes).value(), total + shared.value())
