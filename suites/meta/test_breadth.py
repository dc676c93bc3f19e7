"""A fault that few shapes catch is told as thin; the shapes are sought among cases like those that catch it."""

import json
import re
from collections.abc import Callable

import pytest

from moe_harness.harness.core.case import Case, parse_id
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.contracts import Declarations, Subject
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.proof import breadth, kill_matrix
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase
from moe_harness.suites.meta.breadth import FOUND, shown_on_a_cpu

PAGE = FOUND.with_name("catalogue.md")
EXPERTS = [planned.id for planned in plan("experts", Request())]


def sought(shows: Callable[[Case], bool]) -> tuple[list[str], int]:
    """(cases that kill, how many more were judged) for a fault that shows where `shows` says."""
    first = next(case_id for case_id in EXPERTS if shows(parse_id(case_id)[2]))
    killing, left = [first], [case_id for case_id in EXPERTS if case_id != first]
    return killing, breadth.seek(killing, left, lambda case_id: shows(parse_id(case_id)[2]))


@pytest.mark.parametrize(
    ("shows", "most"),
    [
        (lambda c: (c.E, c.k) == (128, 8), 10),
        (lambda c: c.layout == "hidden_states:padded" and c.T > 1, 10),
        (lambda c: c.routing == "duplicates" and c.masked == "some", 10),
        (lambda c: c.T >= 2048, 20),
        (lambda c: c.T == 0, 20),  # with no other case near those that kill
        (lambda c: c.H > 4096, 20),
        (lambda c: c.data == "signed_weights", 20),
    ],
)
def test_three_shapes_are_found_among_the_cases_most_alike(shows: Callable[[Case], bool], most: int) -> None:
    killing, judged = sought(shows)
    assert breadth.shapes(killing) == breadth.WANTED and judged <= most


def test_what_one_case_catches_costs_so_many_cases_and_no_more() -> None:
    killing, judged = sought(lambda c: (c.T, c.H) == (600, 96))
    assert breadth.shapes(killing) == 1 and judged == breadth.SOUGHT


def test_the_same_shape_in_another_dtype_is_one_shape() -> None:
    case = ExpertsCase(T=3)
    assert case.shape() == case.but(dtype="bf16", seed=4, data="exact", routing="last").shape() != case.but(H=8).shape()
    assert GateCase(lead="2x3").shape() != GateCase(lead="6").shape() != GateCase(lead="").shape()
    assert GroupedLinearCase(bias=True).shape() == GroupedLinearCase(sizes="sparse").shape()


def test_a_fault_with_few_shapes_and_no_reason_is_thin() -> None:
    row = {"status": "killed", "shapes": 2, "few": None}
    assert kill_matrix.thin(row)
    assert not kill_matrix.thin(row | {"few": "only one shape has it"}) and not kill_matrix.thin(row | {"shapes": 3})


def test_three_shapes_are_known_to_kill_every_fault_or_it_says_why_not() -> None:
    """As `docs/breadth.json` was measured; a newer fault is judged by the same command."""
    found = json.loads(FOUND.read_text())
    faults = {fault.name: fault for fault in shown_on_a_cpu()}
    assert set(found) <= set(faults)
    thin = {name for name, killing in found.items() if breadth.shapes(killing) < breadth.WANTED}
    assert thin == {name for name in found if faults[name].few}


def test_the_page_says_how_many_faults_were_looked_at() -> None:
    told = re.search(r"(\d+)\s+of\s+(\d+)\s+faults\s+that\s+a\s+CPU\s+can\s+show", PAGE.read_text())
    assert told and int(told[1]) == len(json.loads(FOUND.read_text())) <= int(told[2])


@pytest.mark.parametrize("name", ["broken_only_at_128_8", "gate_up_swapped", "gate_swallows_nan"])
def test_a_case_that_is_kept_kills(name: str) -> None:
    fault, kept = get(name), json.loads(FOUND.read_text())[name]
    trial = Trial(Subject(fault.stage, fault.spec, fault.function, Declarations.of(fault.function), None), "cpu")
    assert {judge_id(trial, case_id).status for case_id in kept} == {"failed"}
