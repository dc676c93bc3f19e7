"""The published kill matrix is the present catalogue's; every check earns its place; docs/catalogue.md says so."""

import json
import re
from pathlib import Path

import pytest

from moe_harness.harness.core.catalogue import RANKED, all_faults
from moe_harness.harness.core.contracts import SIGNATURES
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.names import CHECK_NAMES
from moe_harness.harness.core.plan import ON_CUDA_ONLY
from moe_harness.harness.core.ranked_stage import find_ranked, rank_checks
from moe_harness.harness.proof import kill_matrix

ROOT = Path(__file__).resolve().parents[2]
MATRIX = json.loads((ROOT / "docs" / "kill_matrix.json").read_text())
SUMMARY = {entry["check"]: entry for entry in MATRIX["summary"]}
PAGE = (ROOT / "docs/catalogue.md").read_text()


def test_the_page_counts_the_faults_without_a_row() -> None:
    """Newer faults than the matrix are killed by tests of their own; the page says how many the picture lacks."""
    known, drawn = {fault.name for fault in all_faults()}, {row["fault"] for row in MATRIX["rows"]}
    assert drawn <= known
    told = re.search(r"(\d+)\s+faults\s+are\s+newer", PAGE)
    assert (int(told[1]) if told else 0) == len(known - drawn)


def test_nothing_survives_and_only_a_gpu_is_missing() -> None:
    assert MATRIX["survivors"] == []
    assert {entry["reason"] for entry in MATRIX["skipped"]} <= {"needs --device cuda"}
    assert MATRIX["killed"] + len(MATRIX["skipped"]) == len(MATRIX["rows"])


@pytest.mark.parametrize("check", dict.fromkeys((*CHECK_NAMES, *rank_checks())))
def test_a_check_kills_something_first_or_is_justified(check: str) -> None:
    entry = SUMMARY[check]
    assert entry["first"] or entry["justification"]
    assert check not in ON_CUDA_ONLY or not entry["kills"]


def test_no_justification_is_left_over() -> None:
    """A line for a check that has a first kill, or is none, says something that is not so."""
    assert all(SUMMARY[check]["kills"] and not SUMMARY[check]["first"] for check in kill_matrix.JUSTIFICATIONS)


def test_a_check_that_earns_nothing_fails_the_command() -> None:
    rows = [{"checks": {"contract": {"status": "survived", "cases": 3}}, "fault": "x", "first_killer": None}]
    assert kill_matrix.unjustified({"summary": [kill_matrix.summary("contract", rows)]}) == ["contract"]


def test_the_readme_counts_the_catalogue() -> None:
    told = re.search(
        r"holds (\d+) faults of one device, (\d+) of them published bugs .* and (\d+) of many\s+ranks; (\d+) of",
        PAGE, re.DOTALL,
    )  # fmt: skip
    one = [fault for fault in all_faults() if fault.stage in SIGNATURES]
    single = [fault for fault in one if not fault.part]
    published = sum(fault.source is not None for fault in single)
    counted = (len(single), published, len(all_faults()) - len(one), len(one) - len(single))
    assert told and tuple(map(int, told.groups())) == counted


def test_the_readme_tells_the_measured_diagnosis() -> None:
    found = json.loads((ROOT / "docs" / "diagnosis.json").read_text())["all"]
    assert f"{found['first']} of {found['faults']}" in PAGE


@pytest.mark.parametrize("stage", RANKED)
def test_every_stage_of_many_ranks_has_faults_that_its_first_check_sees(stage: str) -> None:
    rows = [row for row in MATRIX["rows"] if row["stage"] == stage]
    assert 5 < len(rows) <= len(all_faults(stage))
    assert any(row["first_killer"]["check"] == find_ranked(stage).checks[0] for row in rows)


def test_an_unknown_stage_or_fault_is_told_with_what_there_is() -> None:
    from moe_harness.harness.commands.faults import _chosen

    assert {fault.stage for fault in _chosen(None, None)} == {*SIGNATURES, *RANKED} - {"model"}
    with pytest.raises(UsageError, match="reduction"):
        _chosen("reductions", None)
    with pytest.raises(UsageError, match="reduced_twice"):
        _chosen("reduction", ["reduced_twise"])
