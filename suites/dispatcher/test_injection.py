"""Faults injected at each numbered collective: detected, named by rank and call, and gone in the next case."""

import pytest

from moe_harness.harness.ranks import judge
from moe_harness.harness.ranks.jobs import Injection
from moe_harness.suites.dispatcher.subjects import format_findings

CASE = "dispatcher/dense/R=2,E=4,k=2,T=3+2,seed=1"
CALLS = {"dispatchers:all_to_all_dedup": 5, "dispatchers:naive": 8, "dispatchers:masked": 5}
COMBINE = 8  # the first call of all_to_all_dedup after two dispatches
EVERY_CALL = [(impl, call) for impl, calls in CALLS.items() for call in range(calls)]
NAMED = {"die": "died", "exit": "exited", "raise": "raised", "hang": "hang"}


@pytest.mark.parametrize(("impl", "call"), EVERY_CALL)
@pytest.mark.parametrize("kind", ["die", "exit", "raise"])
def test_a_failing_rank_is_the_headline(impl: str, call: int, kind: str) -> None:
    verdict = judge.judge(impl, CASE, injection=Injection(kind, 1, call))
    assert verdict.failure is not None and verdict.failure.kind == NAMED[kind], format_findings(verdict)
    assert verdict.failure.rank == 1 and f"#{call}" in verdict.failure.call, verdict.failure.headline()
    assert judge.judge(impl, CASE).passed


@pytest.mark.parametrize("call", [0, 2, 4])
def test_a_hanging_rank_is_the_headline(call: int) -> None:
    verdict = judge.judge("dispatchers:all_to_all_dedup", CASE, injection=Injection("hang", 1, call), budget=3.0)
    failure = verdict.failure  # "timeout" where the machine was too busy to tell sleep from work
    assert failure is not None and failure.kind in ("hang", "timeout") and failure.rank == 1, format_findings(verdict)
    assert f"#{call}" in verdict.failure.call


@pytest.mark.parametrize("impl", CALLS)
def test_a_late_rank_is_waited_for(impl: str) -> None:
    assert judge.judge(impl, CASE, injection=Injection("late", 1, 1)).passed


@pytest.mark.parametrize("call", [1, 2, COMBINE])
def test_nan_in_a_payload_is_found(call: int) -> None:
    verdict = judge.judge("dispatchers:all_to_all_dedup", CASE, injection=Injection("nan", 0, call))
    assert "dense" in {finding.about for finding in verdict.findings}, format_findings(verdict)


@pytest.mark.parametrize("call", [1, 2, 3, COMBINE])
def test_a_split_lie_is_a_mismatch(call: int) -> None:
    verdict = judge.judge("dispatchers:all_to_all_dedup", CASE, injection=Injection("split", 1, call))
    assert verdict.failure is not None and verdict.failure.kind == "mismatch", format_findings(verdict)
    assert f"#{call}" in verdict.failure.call and "elements" in verdict.failure.cause, verdict.failure.headline()


@pytest.mark.parametrize(("impl", "call"), EVERY_CALL)
def test_a_dtype_lie_is_a_mismatch(impl: str, call: int) -> None:
    verdict = judge.judge(impl, CASE, injection=Injection("dtype", 1, call))
    assert verdict.failure is not None and verdict.failure.kind == "mismatch", format_findings(verdict)
    assert "dtype" in verdict.failure.cause and f"#{call}" in verdict.failure.call, verdict.failure.headline()


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_a_swapped_order_is_found(call: int) -> None:
    verdict = judge.judge("dispatchers:all_to_all_dedup", CASE, injection=Injection("swap", 1, call))
    assert verdict.findings, format_findings(verdict)
    assert judge.judge("dispatchers:all_to_all_dedup", CASE).passed


def test_every_failure_of_four_ranks_is_pinned_on_one() -> None:
    case = "dispatcher/dense/R=4,E=5,k=2,T=3+0+2+1"
    for rank in range(4):
        verdict = judge.judge("dispatchers:all_to_all", case, injection=Injection("raise", rank, 2))
        assert verdict.failure is not None and verdict.failure.rank == rank, format_findings(verdict)
        assert len(verdict.failure.secondary) == 3
