"""Whose an error is: the author's, the judge's own, or the machine's; and the folders that a killed run leaves."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from moe_harness.harness.core import blame
from moe_harness.harness.core.request import Request
from moe_harness.harness.process import scratch
from moe_harness.harness.report.results import exit_status, verdict_of
from moe_harness.harness.run.session import RunOptions, judge


def _raised(function: object, *arguments: object) -> BaseException:
    try:
        function(*arguments)  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _refuses() -> None:
    raise ValueError("not this input")


def _unpacks() -> None:
    first, second = [1]  # noqa: F841


def _breaks_the_judge() -> None:
    scratch._locked(None)  # type: ignore[arg-type]


def test_the_authors_errors_are_told_from_the_judges() -> None:
    assert blame.is_judges(_raised(_refuses)), "nobody's code was entered"
    assert not blame.is_judges(_raised(blame.hand_over, _refuses))
    assert blame.is_judges(_raised(blame.hand_over, _breaks_the_judge)), "the judge failed underneath"
    assert not blame.is_judges(_raised(blame.hand_over, blame.pass_on, _unpacks)), "passed on, as a collective is"


def test_a_refusal_is_raised_by_the_author() -> None:
    assert blame.own_refusal(_raised(blame.hand_over, _refuses))
    assert not blame.own_refusal(_raised(blame.hand_over, _unpacks))
    assert not blame.own_refusal(_raised(blame.hand_over, blame.pass_on, _refuses))
    assert "_refuses" in blame.place(_raised(blame.hand_over, _refuses))


@pytest.mark.parametrize("number", blame.MACHINE)
def test_what_the_machine_lacks(number: int) -> None:
    assert blame.machine_trouble(OSError(number, os.strerror(number)))
    assert blame.machine_trouble(RuntimeError(f"open() failed: {os.strerror(number)}"))
    assert blame.machine_trouble(OSError(errno.ENOENT, "no such file")) is None
    assert blame.machine_trouble(ValueError(os.strerror(number))) is None


FULL = """
import errno, os
def shared_expert_gate(hidden_states, gate_weight, shared_output):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
"""


def test_a_full_disk_is_no_failure_on_one_device(tmp_path: Path) -> None:
    file = tmp_path / "full.py"
    file.write_text(FULL)
    options = RunOptions(checks=("contract",))
    result = judge("shared_expert_gate", f"{file}:shared_expert_gate", Request(dtypes=("fp32",)), options)
    assert verdict_of(result) == "error" and exit_status([result]) == 3 and not result["failures"]
    assert "No space left" in str(result["error"])


def test_folders_of_killed_runs_are_removed_and_those_of_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, held, foreign = (tmp_path / f"{scratch.PREFIX}{name}" for name in ("left", "held", "foreign"))
    for folder in (left, held, foreign):
        folder.mkdir()
    (left / scratch.LOCK).touch()
    (foreign / "a user's own file").touch()
    with open(held / scratch.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = scratch.make()
        assert not left.exists() and held.exists() and foreign.exists() and Path(made).exists()
    scratch.remove(made)
    assert not Path(made).exists()
