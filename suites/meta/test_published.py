"""Published bugs are in the catalogue, and the kill matrix shows what sees those that ordinary data do not show."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from moe_harness.harness.core.catalogue import RANKED, all_faults, get
from moe_harness.harness.core.contracts import Declarations, Subject
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.ranks.judge import judge

PUBLISHED = tomllib.loads((Path(__file__).parent / "published.toml").read_text())
MATRIX = Path(__file__).resolve().parents[2] / "docs" / "kill_matrix.json"
ROWS = {row["fault"]: row for row in json.loads(MATRIX.read_text())["rows"]}
SOURCES: dict[str | None, list[str]] = {}
for found in all_faults():
    SOURCES.setdefault(found.source, []).append(found.name)


def seen_by(name: str) -> list[str]:
    """The checks that kill a fault; where it cannot be judged on a CPU, why not."""
    row = ROWS[name]
    if row["status"] == "skipped":
        return [row["reason"]]
    return [check for check, cell in row["checks"].items() if cell["status"] == "killed"]


@pytest.mark.parametrize("bug", PUBLISHED["bugs"])
def test_a_published_bug_is_a_fault_that_something_sees(bug: str) -> None:
    names = SOURCES.get(PUBLISHED["bugs"][bug], [])
    assert names, f"no fault has the source {PUBLISHED['bugs'][bug]}"
    drawn = [name for name in names if name in ROWS]
    newer = [get(name) for name in names if name not in ROWS]  # killed in their examples, see test_examples.py
    assert all(seen_by(name) for name in drawn) and all(fault.shows is not None for fault in newer)


@pytest.mark.parametrize("entry", PUBLISHED["invisible"], ids=lambda entry: entry["fault"])
def test_ordinary_data_do_not_show_it(entry: dict[str, Any]) -> None:
    fault = get(entry["fault"])
    if "needs" in entry:
        assert entry["needs"] not in ("cpu",) and fault.devices == (entry["needs"],)
        return
    if fault.stage in RANKED:
        assert judge(fault.spec, entry["ordinary"]).passed
        return
    trial = Trial(Subject(fault.stage, fault.spec, fault.function, Declarations.of(fault.function), None), "cpu")
    messages = [finding.message for finding in judge_id(trial, entry["ordinary"]).findings]
    assert all("but" in entry and message.startswith(entry["but"]) for message in messages), messages
