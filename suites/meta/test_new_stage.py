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


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    copytree(Path(__file__).parent / "toy", folder / "added")
    return subprocess.run(
        [sys.executable, "-m", "moe_harness", *arguments], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MOE_HARNESS_PATH": str(folder / "added"), "COLUMNS": "200"},
    )  # fmt: skip


def judged(folder: Path, spec: str, *options: str) -> dict:
    asked = ("check", "--stage", "rmsnorm", "--impl", spec, *options, "--json", str(folder / "found.json"))
    done = run(folder, *asked)
    assert (folder / "found.json").is_file(), done.stderr
    return json.loads((folder / "found.json").read_text()) | {"status": done.returncode}


def test_its_implementations_are_listed(tmp_path: Path) -> None:
    told = run(tmp_path, "list", "--stage", "rmsnorm").stdout
    assert "own:mean_forgotten" in told and "own " in told


def test_a_right_implementation_passes_every_check(tmp_path: Path) -> None:
    found = judged(tmp_path, "own")
    assert (found["verdict"], found["status"], found["failures"]) == ("pass", 0, [])
    assert {check["name"] for check in found["checks"]} >= {"contract", "numeric", "memory", "laws", "property"}
    assert found["coverage"]["power"]["rejected"] > 0 if "rejected" in found["coverage"]["power"] else True


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_output_of_any_kind_is_found(tmp_path: Path, name: str) -> None:
    check, message = WRONG[name]
    found = judged(tmp_path, f"own:{name}", "--check", check)
    assert (found["verdict"], found["status"]) == ("fail", 1)
    assert any(f["check"] == check and f["message"].startswith(message) for f in found["failures"])


def test_a_stage_over_many_ranks_is_added_alike(tmp_path: Path) -> None:
    asked = ("check", "--stage", "gather", "--ranks", "1,2", "--impl", "own", "--impl", "own:own_rows_first")
    done = run(tmp_path, *asked, "--json", str(tmp_path / "found.json"))
    right, wrong = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert (right["verdict"], wrong["verdict"], done.returncode) == ("pass", "fail", 1)
    assert {failure["check"] for failure in wrong["failures"]} == {"rows"}
