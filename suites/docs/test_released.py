"""docs/released.md is what its data say, and what it tells to run can be run."""

import ast

import pytest

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.registry import registered
from moe_harness.suites.docs import released

FOUND = [found for library in released.files() for found in library["findings"]]
REPRODUCERS = sorted(released.REPRODUCERS.glob("*.py"))


def test_the_page_equals_the_data() -> None:
    assert released.PAGE.read_text() == released.page(), "run python -m moe_harness.suites.docs.released"


def test_ratios_are_those_of_the_times() -> None:
    first = released.files()[0]["timed"][0]
    assert released.timed(first)[-1].split(" | ")[1:3] == ["1.40", "1.16"]


@pytest.mark.parametrize("found", [f for f in FOUND if "case" in f], ids=lambda found: found["case"])
def test_a_replay_line_names_a_case_and_an_implementation(found: dict[str, str]) -> None:
    stage = found["case"].partition("/")[0]
    assert found["spec"] in registered(stage)
    assert parse_id(found["case"])[:2] == tuple(found["case"].split("/")[:2])


def test_every_defect_has_a_reproducer_without_this_project() -> None:
    named = {found["reproducer"] for found in FOUND if "reproducer" in found}
    assert named == {path.name for path in REPRODUCERS}
    assert all("reproducer" in found for found in FOUND if found["kind"].startswith("defect"))
    for path in REPRODUCERS:
        text = path.read_text()
        modules = {n.module.partition(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
        assert modules == {"vllm"} and len(text.splitlines()) <= 30, path
