"""A stage is added by a folder, no list names it; its outputs: a tensor, integers and an operand written in place."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    "mean_forgotten": ("numeric", "the result: element"),
    "second_largest": ("numeric", "the largest: element"),
    "running_twice": ("numeric", "running: element"),
    "weight_written": ("contract", "the input weight was modified"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stages")
    copytree(Path(__file__).parent / "toy", made / "added")
    return made


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moe_harness", *arguments], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MOE_HARNESS_PATH": str(folder / "added"), "COLUMNS": "200"},
    )  # fmt: skip


def judged(folder: Path, stage: str, *options: str) -> tuple[dict, int]:
    """(result, exit status) of a run."""
    done = run(folder, "check", "--stage", stage, *options, "--json", str(folder / "found.json"))
    assert (folder / "found.json").is_file(), done.stderr
    return json.loads((folder / "found.json").read_text()), done.returncode


def test_its_implementations_are_listed(folder: Path) -> None:
    told = run(folder, "list", "--stage", "rmsnorm").stdout
    assert "own:mean_forgotten" in told and "own " in told


def test_a_right_implementation_passes_every_check(folder: Path) -> None:
    found, status = judged(folder, "rmsnorm", "--impl", "own")
    assert (found["verdict"], status, found["failures"]) == ("pass", 0, [])
    assert {check["name"] for check in found["checks"]} >= {"contract", "numeric", "memory", "laws", "property"}
    assert found["coverage"]["power"]["rejected"] > 0 if "rejected" in found["coverage"]["power"] else True


@pytest.fixture(scope="module")
def failed(folder: Path) -> dict[str, dict]:
    """The results of all that are wrong, judged by one command: each of its own takes torch's import once more."""
    specs = ",".join(f"own:{name}" for name in WRONG)
    found, status = judged(folder, "rmsnorm", "--impl", specs, "--check", "contract,numeric")
    assert status == 1
    return {run["impl"].removeprefix("own:"): run for run in found["runs"]}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_output_of_any_kind_is_found(failed: dict[str, dict], name: str) -> None:
    check, message = WRONG[name]
    assert failed[name]["verdict"] == "fail"
    assert any(f["check"] == check and f["message"].startswith(message) for f in failed[name]["failures"])


def test_a_stage_over_many_ranks_is_added_alike(folder: Path) -> None:
    found, status = judged(folder, "gather", "--ranks", "1,2", "--impl", "own", "--impl", "own:own_rows_first")
    right, wrong = found["runs"]
    assert (right["verdict"], wrong["verdict"], status) == ("pass", "fail", 1)
    assert {failure["check"] for failure in wrong["failures"]} == {"rows"}
