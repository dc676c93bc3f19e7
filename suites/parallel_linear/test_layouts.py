"""The whole block under every layout: each rank's output has the very bits of one rank that holds everything."""

from collections.abc import Callable
from typing import Any

import pytest

from moe_harness.harness.core.bounds import EXACT_FIT
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.ranks import pool
from moe_harness.harness.stages.reduction.faults.reductions import name_fit

TASK = "moe_harness.suites.parallel_linear.layout_tasks:run"
DISPATCHERS = ("naive", "allgather_reducescatter", "all_to_all", "all_to_all_dedup", "masked", "local_allreduce")
BASE: dict[str, Any] = {"experts": 6, "k": 3, "dtype": "fp32"}


def check(spec: dict[str, Any], ranks: int, seed: int = 0, backend: str = "gloo") -> None:
    """Every rank's output is, bit for bit, that of one rank."""
    outcome = pool.run(TASK, spec, ranks=ranks, seed=seed, backend=backend)
    assert outcome.ok, (outcome.failure.headline(), outcome.failure.trace)
    for rank, result in enumerate(outcome.results):
        assert result["equal"], f"rank {rank} of {spec}: {result['message']}, fit {result['fit']}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shared", [None, "sharded", "replicated"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_tensor_parallel(ranks: int, shared: str | None, dtype: str) -> None:
    check({**BASE, "layout": "tp", "tokens": [5], "shared": shared, "dtype": dtype, "k": 2}, ranks)


@pytest.mark.parametrize("shared", [None, "sharded", "replicated"])
@pytest.mark.parametrize("tokens", [[3, 3], [0, 5], [4, 0], [0, 0], [2, 1, 0, 3]])
def test_sequence_parallel(tokens: list[int], shared: str | None) -> None:
    check({**BASE, "layout": "sequence", "tokens": tokens, "shared": shared}, len(tokens))


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("owner", [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6, [0, 1, 0, 1, 0, 1]])
def test_expert_parallel_even_uneven_and_idle(dispatcher: str, owner: list[int]) -> None:
    spec = {**BASE, "layout": "ep", "dispatcher": f"dispatchers:{dispatcher}", "owner": owner, "shared": "replicated"}
    check({**spec, "tokens": [4, 1]}, 2)
    check({**spec, "tokens": [0, 3]}, 2)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_more_ranks_than_experts(dispatcher: str) -> None:
    spec = {**BASE, "layout": "ep", "dispatcher": f"dispatchers:{dispatcher}", "experts": 3, "owner": [0, 3, 3]}
    check({**spec, "tokens": [2, 0, 3, 1]}, 4)


@pytest.mark.parametrize("dispatcher", [d for d in DISPATCHERS if d != "local_allreduce"])
@pytest.mark.parametrize("shared", [None, "sharded", "replicated"])
def test_tensor_and_expert_parallel(dispatcher: str, shared: str | None) -> None:
    spec = {**BASE, "layout": "tp_ep", "dispatcher": f"dispatchers:{dispatcher}", "owner": [0, 0, 1, 1, 1, 1]}
    check({**spec, "tokens": [3, 2], "shared": shared}, 4)
    check({**spec, "tokens": [0, 2], "shared": shared}, 4)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_redundant_experts(dispatcher: str) -> None:
    """Experts 1 and 4 are held twice; the physical experts of a logical one are on different ranks."""
    replicas = [[0], [1, 6], [2], [3], [4, 7], [5]]
    spec = {**BASE, "layout": "ep", "dispatcher": f"dispatchers:{dispatcher}", "replicas": replicas}
    check({**spec, "owner": [0, 0, 0, 0, 1, 1, 1, 0], "tokens": [6, 3], "shared": "replicated"}, 2)


@pytest.mark.parametrize("layout", ["tp", "sequence", "ep"])
def test_zero_experts(layout: str) -> None:
    spec = {**BASE, "layout": layout, "zero": 3, "k": 4, "tokens": [5, 2], "shared": "replicated"}
    if layout == "ep":
        spec |= {"dispatcher": "dispatchers:all_to_all_dedup", "owner": [0, 0, 0, 1, 1, 1]}
    check(spec, 2)


@pytest.mark.parametrize(
    "fault",
    ["rows:own_copies_lost", "rows:finalize_not_reverse", "ownership:owner_by_division", "collectives:reduced_again"],
)
def test_a_wrong_dispatcher_shows_in_the_block(fault: str) -> None:
    spec = {
        **BASE,
        "layout": "ep",
        "dispatcher": f"moe_harness.harness.stages.dispatcher.faults.{fault}",
        "owner": [0, 0, 1, 1, 1, 1],
    }
    outcome = pool.run(TASK, {**spec, "tokens": [4, 4]}, ranks=2)
    assert not outcome.ok or not all(result["equal"] for result in outcome.results)


# (a, b) of  output = a * Routed + b * Shared  over n ranks; None where ranks hold unequal parts.
FITS: dict[str, Callable[[int], tuple[float, float] | None]] = {
    "replicated_shared_summed": lambda n: (1, n),
    "shared_partial_plus_routed_full": lambda n: None,
    "reduced_twice": lambda n: (n, n),
    "reduction_left_out": lambda n: None,
    "shared_divided_by_ranks": lambda n: (1, 1 / n),
    "shared_dropped": lambda n: (1, 0),
    "scale_touches_shared": lambda n: (1, 2),
}


BLOCK_FAULTS = [fault for fault in all_faults("reduction") if fault.name in FITS]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("fault", BLOCK_FAULTS, ids=lambda fault: fault.name)
def test_a_misplaced_reduction_is_seen_and_named(fault: Fault, ranks: int) -> None:
    shared = {"partial": "sharded"}.get(parse_id(fault.shows["case"])[2].shared, "replicated")
    spec = {**BASE, "layout": "tp", "tokens": [7], "shared": shared, "reduce": fault.spec}
    outcome = pool.run(TASK, spec, ranks=ranks)
    assert outcome.ok, outcome.failure
    assert not any(result["equal"] for result in outcome.results)
    a, b, residual = outcome.results[0]["fit"]
    expected = FITS[fault.name](ranks)
    if expected is None:
        assert residual > EXACT_FIT and "missing" in name_fit(a, b, residual, ranks)
    else:
        assert (a, b) == pytest.approx(expected, abs=1e-4) and name_fit(a, b, residual, ranks) != "right"


def test_replicas_have_to_be_a_map() -> None:
    spec = {**BASE, "layout": "tp", "tokens": [2], "replicas": [[0], [1], [2], [3], [4], [4]]}
    outcome = pool.run(TASK, spec, ranks=1)
    assert outcome.failure is not None and "not a map from 6 logical" in outcome.failure.cause
