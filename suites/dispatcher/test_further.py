"""What values on plain data do not show: formats, strides, sizes, memory and state between two rounds."""

from pathlib import Path

import pytest

from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.suites.dispatcher.strangers import further
from moe_harness.suites.dispatcher.subjects import format_findings

FILE = Path(further.__file__)
RIGHT = ("ScatteredSum", "Server", "SpareRows", "OneMessage")


@pytest.mark.parametrize("name", RIGHT)
def test_right_in_a_style_of_its_own(name: str) -> None:
    """A share of the plan, the largest rows in it."""
    plan = list(cases.plan([2, 3]))
    chosen = [planned for place, planned in enumerate(plan) if place % 6 == len(name) % 6 or "H=4097" in planned.id]
    for planned in chosen:
        verdict = judge.judge(f"{FILE}:{name}", planned.id)
        assert verdict.passed, format_findings(verdict)


@pytest.mark.parametrize("name", further.SAID)
def test_wrong_is_told_where_it_shows(name: str) -> None:
    case, words = further.SAID[name]
    finding = judge.judge(f"{FILE}:{name}", f"dispatcher/{case}").findings[0]
    assert words in finding.message, finding


def test_what_shows_them_is_planned_over_every_world() -> None:
    for ranks in (1, 2, 3, 4):
        planned = [planned.case for planned in cases.plan([ranks])]
        assert {case.layout.partition(":")[0] for case in planned} == {"", *cases.OPERANDS}
        assert {1025, 2048, 4097} <= {case.H for case in planned}
        assert {"fp32", "bf16", "fp16"} == {case.dtype for case in planned if case.layout}
