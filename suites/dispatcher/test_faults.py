"""The kill matrix of the stages on many ranks: every fault is seen where it shows and found by the planned cases."""

from collections.abc import Iterator

import pytest

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.suites.dispatcher.subjects import format_findings

FAULTS = all_faults("dispatcher")
BASES = ("Gathered", "Copies", "Deduplicated")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_seen_where_it_shows(fault: Fault) -> None:
    verdict = judge.judge(fault.spec, fault.shows["case"])
    assert fault.shows["seen_by"] in {finding.about for finding in verdict.findings}, format_findings(verdict)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.hidden], ids=lambda fault: fault.name)
def test_right_where_it_is_hidden(fault: Fault) -> None:
    for case in fault.hidden:
        verdict = judge.judge(fault.spec, case)
        assert verdict.passed, format_findings(verdict)


def _planned(copies: bool = False) -> Iterator[str]:
    for planned in cases.plan([1, 2, 4], copies=copies):
        yield planned.id


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_killed_by_the_planned_cases(fault: Fault) -> None:
    world = parse_id(fault.shows["case"])[2].R
    planned = sorted(_planned(copies=fault.family == "EPLB"), key=lambda case: world != parse_id(case)[2].R)
    assert any(judge.judge(fault.spec, case).findings for case in planned), f"{fault.name} survives"


@pytest.mark.parametrize("base", BASES)
def test_what_the_faults_are_made_from_is_right(base: str) -> None:
    for case in list(_planned())[::4]:
        verdict = judge.judge(f"moe_harness.harness.stages.dispatcher.faults._bases:{base}", case)
        assert verdict.passed, format_findings(verdict)


EVIDENCE = {
    "reduced_again": "reduced twice",
    "never_reduced": "contribution lost",
    "reduced_over_one_axis": "contribution lost",
    "finalize_not_reverse": "row of another token",
    "weights_not_permuted": "weight changed",
    "payload_in_bf16": "payload changed",
    "sizes_of_first_chunk": "row lost",
    "foreign_slot_to_expert_zero": "row not wanted",
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_the_cause_is_named(name: str) -> None:
    fault = next(f for f in FAULTS if f.name == name)
    found = judge.judge(fault.spec, fault.shows["case"]).findings[0].diagnosis
    assert EVIDENCE[name] in {statement["fault"] for statement in found}
