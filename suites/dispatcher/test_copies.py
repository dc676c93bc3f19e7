"""Redundant experts and expert parallel groups of some of the ranks."""

from pathlib import Path

import pytest

from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.diagnosis.ranked import named
from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.suites.dispatcher.subjects import format_findings

RIGHT = (
    *(f"dispatchers:{name}" for name in ("naive", "allgather_reducescatter", "all_to_all", "all_to_all_dedup", "masked",
                                         "local_allreduce")),
    "moe_harness.harness.stages.dispatcher.faults.copies:Replicated",
)  # fmt: skip
FAULTS = [fault for fault in all_faults("dispatcher") if fault.family == "EPLB" or "groups" in fault.shows["case"]]
PADDED = f"{Path(__file__).parent / 'strangers' / 'right.py'}:Padded"


def _planned(of: str, worlds: list[int], copies: bool) -> list[str]:
    plan = cases.plan(worlds, copies=copies)
    return [planned.id for planned in plan if getattr(planned.case, of) != (of == "groups")]


@pytest.mark.parametrize("impl", RIGHT)
def test_right_with_copies(impl: str) -> None:
    planned = _planned("copies", [2, 3], copies=True)
    assert len(planned) > 20
    for case in planned[::2]:
        verdict = judge.judge(impl, case)
        assert verdict.passed, verdict.unsupported or format_findings(verdict)


@pytest.mark.parametrize("impl", [*RIGHT, PADDED])
def test_right_in_groups(impl: str) -> None:
    planned = _planned("groups", [2, 4], copies=False)
    assert len(planned) > 20
    for case in planned[::2]:
        verdict = judge.judge(impl, case)
        assert verdict.passed, verdict.unsupported or format_findings(verdict)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_three_planned_cases_see_a_fault(fault: Fault) -> None:
    of = "groups" if "groups" in fault.shows["case"] else "copies"
    killed = 0
    for case in _planned(of, [2, 4], copies=True):
        killed += bool(judge.judge(fault.spec, case).findings)
        if killed == 3:
            return
    raise AssertionError(f"{killed} cases see it")


def test_copies_are_planned_for_those_that_take_them() -> None:
    assert any("copies" in case for case in judge.planned("dispatcher", "dispatchers:all_to_all", [2]))
    assert not any("copies" in case for case in judge.planned("dispatcher", PADDED, [2]))
    verdict = judge.judge(PADDED, "dispatcher/dense/R=2,E=3,k=2,T=2+3,copies=2")
    assert "supports_copies" in str(verdict.unsupported) and not verdict.findings


def test_half_a_ring_is_no_sum_over_one_axis() -> None:
    fault = next(fault for fault in all_faults("dispatcher") if fault.name == "half_a_ring")
    for ranks, tokens in ((2, "3+3"), (4, "3+2+1+4")):
        found = named(fault.spec, f"dispatcher/dense/R={ranks},E=6,k=3,T={tokens}", seconds=600.0)
        assert found and found[0]["fault"] == "half_a_ring", found
        assert "reduced_over_one_axis" not in str(found)
