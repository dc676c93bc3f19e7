"""The sum over ranks through symmetric memory: its kernel interpreted, in an order of arrival that shows its faults."""

import pytest

pytest.importorskip("triton")

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.ranks import judge, pool
from moe_harness.harness.stages.reduction import cases
from moe_harness.suites.reduction.planted_sum_norm import FAULTS

TASKS, RANKS = "moe_harness.suites.reduction.sum_norm_tasks", 3  # of two ranks' parts either order is the same sum


def complaints(dtype: str, **spec: str) -> list[str]:
    outcome = pool.run(f"{TASKS}:run", {"dtype": dtype, **spec}, ranks=RANKS)
    assert outcome.ok, outcome.failure
    told = [line for result in outcome.results for line in result["told"]]
    differ = len({result["digest"] for result in outcome.results}) > 1
    return told + (["the ranks hold different bits"] if differ else [])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_rank_holds_the_sum_in_order_with_residual_and_norm(dtype: str) -> None:
    assert complaints(dtype) == []


def test_another_number_of_rows_gives_nan() -> None:
    assert pool.run(f"{TASKS}:other_rows", {}, ranks=RANKS).results == [[]] * RANKS


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]
    if fault.seen == "NaN":
        outcome = pool.run(f"{TASKS}:other_rows", {"fault": name}, ranks=RANKS)
        told = [line for result in outcome.results for line in result]
    else:
        told = complaints("bf16" if "dtype" in name else "fp32", fault=name)
    assert any(fault.seen in line for line in told), told


def test_every_fault_is_planted_where_it_says() -> None:
    assert pool.run(f"{TASKS}:not_planted", {}, ranks=RANKS).results == [[]] * RANKS


def test_it_is_a_reduction() -> None:
    """The stage's own cases, what it leaves to the plain reduction among them."""
    planned = [p for p in cases.plan([2]) if p.case.groups == 1 and p.case.rows() < 20]
    for each in [p for p in planned if p.case.routed == "partial" and not p.case.sequence] + planned[::9]:
        verdict = judge.judge("suites/reduction/interpreted.py:reduction", each.id)
        assert verdict.passed, (verdict.findings, verdict.unsupported)


def test_it_is_refused_without_gpus() -> None:
    case = next(p.id for p in cases.plan([2]) if parse_id(p.id)[2].routed == "partial")
    assert "nccl" in str(judge.judge("parallel:symmetric", case).unsupported)
