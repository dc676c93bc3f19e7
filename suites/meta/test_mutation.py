"""The mutation run: every edited module has suites that exist, only kills count; docs/catalogue.md tells the result."""

import tomllib
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib import import_module
from pathlib import Path
from queue import Queue
from types import ModuleType

import pytest

from moe_harness.suites.mutation import report
from moe_harness.suites.mutation.report import Report, Row
from moe_harness.suites.mutation.selection import RULES, rule_of, suites_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / "cosmic-ray.toml").read_text())["cosmic-ray"]


def files(pattern: str) -> set[str]:
    return set(glob(pattern, root_dir=ROOT, recursive=True))


def edited() -> list[str]:
    """Modules that cosmic-ray edits, as paths from the root; those without a function hold nothing to judge."""
    found = set().union(*(files(f"{folder}/**/*.py") for folder in CONFIG["module-path"]))
    left = found.difference(*(files(pattern) for pattern in CONFIG["excluded-modules"]))
    return sorted(path for path in left if "def " in (ROOT / path).read_text())


@pytest.mark.parametrize("module", edited())
def test_an_edited_module_has_suites_that_exist(module: str) -> None:
    for entry in suites_of(module):
        paths = entry.partition(" -k")[0].split()
        assert paths and all((ROOT / path).exists() for path in paths), entry


def test_no_rule_and_no_exclusion_is_left_over() -> None:
    """A pattern that nothing reaches, or that an earlier one shadows, says something that is not so."""
    used = {rule_of(module)[0] for module in edited()}
    assert [pattern for pattern, _ in RULES if pattern not in used] == []
    assert all(files(pattern) for pattern in CONFIG["excluded-modules"])


def test_a_module_without_a_rule_is_judged_by_the_tests_of_the_judge() -> None:
    assert suites_of("harness/new.py") == suites_of("harness/core/findings.py")


ROWS = [
    Row("a.py", 3, "x", outcome, "-old\n+new", "f") for outcome in ["killed"] * 8 + ["survived", "timeout", "error"]
]


def test_only_kills_count_and_what_could_not_be_tried_does_not() -> None:
    found = Report.of(ROWS, seed=1, mutants=90, workers=2, seconds=7)
    assert found.score == 0.8 and found.interval == (0.4902, 0.9433)  # Wilson's, of 8 in 10
    assert found.modules == {"a.py": {"killed": 8, "survived": 1, "timeout": 1, "error": 1}}
    assert [row["outcome"] for row in found.unnoticed] == ["survived", "timeout", "error"]
    assert found.text().endswith("noticed: 80.0% (95 % interval 49.0% to 94.3%) of a sample of 11 of 90 edits, seed 1: "
                                 "8 killed, 1 survived, 1 timeout, 1 error; 7 s with 2 workers")  # fmt: skip


def test_the_readme_tells_the_committed_result() -> None:
    text = report.PAGE.read_text()
    assert report.readme_line() in text, "run python -m moe_harness.suites.mutation.report"
    assert report.rewritten(text) == text


@pytest.fixture
def run() -> ModuleType:
    pytest.importorskip("cosmic_ray", reason="cosmic-ray is installed for tox -e mutation only")
    return import_module("moe_harness.suites.mutation.run")


def test_a_suite_that_fails_on_the_tree_as_it_is_ends_the_run(run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert 1 == 2\n")
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(SystemExit, match=r"1 == 2(?s:.)*test_red.py fails on the tree as it"),
    ):
        run.baseline(pool, [str(tmp_path / "test_red.py")])


def test_a_run_that_was_stopped_or_had_no_outcome_is_no_kill(run: ModuleType) -> None:
    normal, killed = run.WorkerOutcome.NORMAL, run.TestOutcome.KILLED
    assert run.outcome_of(run.WorkResult(normal, "1 failed", killed)) == "killed"
    assert run.outcome_of(run.WorkResult(normal, "timeout", killed)) == "timeout"
    assert run.outcome_of(run.WorkResult(normal, "", run.TestOutcome.INCOMPETENT)) == "error"
    assert run.outcome_of(run.WorkResult(run.WorkerOutcome.ABNORMAL, "no connection")) == "error"


def test_annotations_are_left_alone(run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("x: int | None = 3 | 4\n\n\ndef f(a: int | str) -> int | None:\n    return a | 1\n")
    assert sorted(run.annotations(str(tmp_path / "m.py"))) == [((1, 3), (1, 13)), ((4, 9), (4, 18)), ((4, 23), (4, 33))]


def test_an_edit_of_a_copy_is_what_is_imported_there(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moe_harness/ holds links: a copy that follows them imports modules that nobody edits, and all mutants survive."""
    (tmp_path / "tree/harness").mkdir(parents=True)
    (tmp_path / "tree/moe_harness").mkdir()
    (tmp_path / "tree/harness/one.py").write_text("one = 1\n")
    (tmp_path / "tree/moe_harness/harness").symlink_to("../harness")
    monkeypatch.chdir(tmp_path)  # settle goes elsewhere, and sets the path of imports
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copies = Queue[str]()
    copies.put(str(tmp_path / "copy"))
    run.settle(str(tmp_path / "tree"), copies)
    Path("harness/one.py").write_text("one = 2\n")
    assert Path("moe_harness/harness/one.py").read_text() == "one = 2\n"
