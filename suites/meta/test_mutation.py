"""The mutation run: every edited module is judged by tests that exist, only kills count; docs/catalogue.md tells it."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib import import_module
from keyword import iskeyword
from pathlib import Path
from queue import Queue
from types import ModuleType

import pytest

from moe_harness.suites.mutation import report
from moe_harness.suites.mutation.report import Report, Row
from moe_harness.suites.mutation.selection import RULES, rule_of, suites_of
from moe_harness.suites.plugin import PLUGIN

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / "cosmic-ray.toml").read_text())["cosmic-ray"]


def files(pattern: str) -> set[str]:
    return set(glob(pattern, root_dir=ROOT, recursive=True))


def edited() -> list[str]:
    """Modules that cosmic-ray edits, as paths from the root; those without a function hold nothing to judge."""
    found = set().union(*(files(f"{folder}/**/*.py") for folder in CONFIG["module-path"]))
    left = found.difference(*(files(pattern) for pattern in CONFIG["excluded-modules"]))
    return sorted(path for path in left if "def " in (ROOT / path).read_text())


MODULES = edited()
NOT_HERE = re.compile(r"^pytestmark = .*mark\.(gpu|multigpu|accuracy)\b", re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_an_edited_module_has_a_rule_and_suites_that_exist(module: str) -> None:
    """The rule for what is new names the judge's own tests: of a module that they never touch, all edits survive."""
    assert rule_of(module)[0] != RULES[-1][0], "suites/mutation/selection.py: say which suites go through it"
    entries = suites_of(module)
    assert entries and all((ROOT / path).exists() for entry in entries for path in parts(entry)[0])


def parts(entry: str) -> tuple[list[str], str]:
    """The paths of an entry, and its words after -k."""
    paths, _, words = entry.partition(" -k ")
    return paths.split(), words.strip("'")


def test_no_entry_is_without_a_test() -> None:
    """Of no test pytest makes a failure, which looks like an edit that was noticed, and ends a run before its first."""
    entries = [parts(entry) for entry in sorted({entry for module in MODULES for entry in suites_of(module)})]
    ids = collected({path for paths, words in entries if words for path in paths})
    for paths, words in entries:
        if words:
            assert any(test.startswith(tuple(paths)) and fits(words, test) for test in ids), (paths, words)
        else:
            assert all(has_tests(ROOT / path) for path in paths), paths


def collected(paths: Iterable[str]) -> list[str]:
    """Ids of the tests of `paths` that a CPU runs."""
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not multigpu and not accuracy"]
    command = [sys.executable, "-m", "pytest", *PLUGIN, *options, *sorted(paths)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if "::" in line]


def fits(words: str, test: str) -> bool:
    """What -k says of an id: its words are those of the selection, joined by and, or and not."""
    terms = re.sub(r"\w+", lambda word: word[0] if iskeyword(word[0]) else str(word[0] in test), words)
    return bool(eval(terms))


def has_tests(path: Path) -> bool:
    """Whether a CPU runs any of a file, or of a folder's."""
    texts = [file.read_text() for file in ([path] if path.is_file() else path.glob("test_*.py"))]
    return any(("def test_" in text or "checks_of(" in text) and not NOT_HERE.search(text) for text in texts)


def test_no_rule_and_no_exclusion_is_left_over() -> None:
    """A pattern that nothing reaches, or that an earlier one shadows, says something that is not so."""
    used = {rule_of(module)[0] for module in MODULES}
    assert [pattern for pattern, _ in RULES[:-1] if pattern not in used] == []
    assert all(files(pattern) for pattern in CONFIG["excluded-modules"])


def test_a_new_module_is_judged_by_the_tests_of_the_judge() -> None:
    assert suites_of("harness/new.py") == suites_of("harness/core/invocation.py")


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
