"""The published kill matrix is the present catalogue's; every check earns its place; docs/catalogue.md says so."""

import json
import re
from pathlib import Path

import pytest

from moe_harness.harness.core.catalogue import RANKED, all_faults
from moe_harness.harness.core.contracts import SIGNATURES
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.names import CHECK_NAMES
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request
from moe_harness.harness.core.ranked_stage import find_ranked, rank_checks
from moe_harness.harness.proof import kill_matrix, kill_matrix_view, parts

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


# --------------------------------------------------------------------------------------------------------- in parts


ASKED = kill_matrix.MatrixOptions()
FAULTS = all_faults("reduction")


def row(name: str, killed: bool = True) -> dict:
    first = {"check": "reduction", "case": "c", "cases": 1, "of_check": 1} if killed else None
    return {"fault": name, "stage": "reduction", "status": "killed" if killed else "survived", "reason": None,
            "first_killer": first, "checks": {}, "killing": [], "shapes": 3, "few": None, "seconds": 2.0}  # fmt: skip


def written(path: Path, rows: list[dict], options: kill_matrix.MatrixOptions = ASKED) -> Path:
    kill_matrix_view.write_json(kill_matrix.matrix(rows, options), path)
    return path


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_each_fault_is_in_one_share(count: int) -> None:
    shares = [parts.share(FAULTS, f"{number}/{count}") for number in range(1, count + 1)]
    names = [fault.name for share in shares for fault in share]
    assert sorted(names) == sorted(fault.name for fault in FAULTS) and len(set(names)) == len(names)


@pytest.mark.parametrize("which", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_what_is_no_share_is_told(which: str) -> None:
    with pytest.raises(UsageError, match=f"--shard is '{which}'.*2/5"):
        parts.share(FAULTS, which)


def test_parts_are_put_together_in_the_order_of_the_catalogue(tmp_path: Path) -> None:
    names = [fault.name for fault in FAULTS]
    earlier = parts.read([written(tmp_path / "a", [row(names[2]), row(names[0], killed=False)])], ASKED)
    kept = parts.Kept(tmp_path / "all", ASKED, earlier, FAULTS)
    kept.add(row(names[1]))
    kept.add(row(names[0]))  # judged anew: this row stands
    whole = kept.matrix()
    assert [each["fault"] for each in whole["rows"]] == names[:3]
    assert whole["survivors"] == [] and whole["killed"] == 3 and whole["seconds"] == 6.0


def test_what_was_judged_is_in_the_file_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "EVERY", 0.0)
    kept = parts.Kept(tmp_path / "all", ASKED, [], FAULTS)
    kept.add(row(FAULTS[0].name))
    assert [each["fault"] for each in parts.read([tmp_path / "all"], ASKED)[0]["rows"]] == [FAULTS[0].name]


def test_a_part_that_was_asked_something_else_is_no_part(tmp_path: Path) -> None:
    other = kill_matrix.MatrixOptions(Request(seed=3))
    with pytest.raises(UsageError, match="its seed is 3, here it is 0"):
        parts.read([written(tmp_path / "a", [], other)], ASKED)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [1]}', '{"rows": [{"fault": "x"}]}', None])
def test_what_is_no_matrix_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "a").write_text(text)
    with pytest.raises(UsageError, match="what `moe-harness faults --json` wr"):
        parts.read([tmp_path / "a"], ASKED)
