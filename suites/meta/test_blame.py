"""Whose an error is: the author's, the judge's own, or the machine's; and the folders that a killed run leaves."""

import errno
import fcntl
import os
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_harness.harness.core import blame
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.core.plan import Request
from moe_harness.harness.process import start
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
    start._locked(None)  # type: ignore[arg-type]


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


def _raised_in(folder: str, error: type[Exception]) -> BaseException:
    """Raised by a function of torch's, in that folder, which the author has called."""
    scope: dict[str, object] = {"error": error}
    file = os.path.join(os.path.dirname(torch.__file__), folder, "module.py")
    exec(compile("def inner():\n    raise error('no')", file, "exec"), scope)

    def calls() -> None:
        scope["inner"]()  # type: ignore[operator]

    return _raised(blame.hand_over, calls)


def test_not_implemented_is_a_refusal_unless_it_is_of_the_process_group_that_the_judge_made() -> None:
    assert blame.own_refusal(_raised_in("nn", NotImplementedError))
    assert not blame.own_refusal(_raised_in("distributed", NotImplementedError))
    assert not blame.own_refusal(_raised_in("nn", ValueError))


def _calls_on() -> None:
    _refuses()


def test_the_place_is_the_authors_own_line_nearest_to_the_error() -> None:
    for function, name in ((_calls_on, "_refuses"), (_breaks_the_judge, "_breaks_the_judge")):
        assert blame.place(_raised(blame.hand_over, function)).endswith(f" in {name}")
    beneath = blame.place(_raised_in("nn", ValueError))
    assert Path(__file__).name in beneath and beneath.endswith(" in calls"), "not torch's"
    assert "in _locked" in blame.place(_raised(_breaks_the_judge)), "nobody's code was entered"
    assert blame.place(ValueError()) == "(nowhere)"


def test_what_the_machine_lacks_ends_the_run_and_nothing_else_does() -> None:
    full = os.strerror(errno.ENOSPC)
    for error in (OSError(errno.ENOSPC, full), RuntimeError(f"write failed: {full}\nat line 3")):
        words = r"not the implementation: .*No space left on device\S*\n  free"
        with pytest.raises(CannotJudge, match=words) as told, blame.judging():
            raise error
        assert told.value.__cause__ is error
    for error in (OSError(errno.ENOENT, "gone"), RuntimeError("boom"), ValueError(full)):
        with pytest.raises(type(error)) as left, blame.judging():
            raise error
        assert left.value is error


def _adds() -> None:
    sum([None, 1])  # type: ignore[list-item]


def _seeks() -> None:
    [1].index(3)


def _adds_nothing() -> object:
    nothing = None
    return nothing + torch.ones(1)  # type: ignore[operator]


def _calls_torch_wrongly() -> None:
    torch.ones(2).sort(0, stable=True, descending=1, out=3)  # type: ignore[call-overload]


def _refuses_with_words_of_python() -> None:
    raise TypeError("not enough values to unpack")


def _refuses_in_compiled_code() -> None:
    int.from_bytes(b"1", "upwards")  # type: ignore[arg-type]  # as a C++ extension does


@pytest.mark.parametrize("function", [_unpacks, _adds, _seeks, _adds_nothing, _calls_torch_wrongly])
def test_an_accident_is_no_refusal(function) -> None:
    assert blame.accident(_raised(blame.hand_over, function))


CALLS = {
    "remove": lambda: [1].remove(2), "index": lambda: (1,).index(2), "deque": lambda: deque([1]).remove(2),
    "max": lambda: max([]), "float": lambda: float("x"), "nan": lambda: int(float("nan")), "zip": lambda: [*_unequal()],
    "range": lambda: range(0, 1, 0), "substring": lambda: "a".index("b"), "hash": lambda: {[]}, "len": lambda: len(1),
    "join": lambda: "".join([1]), "broadcast": lambda: np.add(np.ones(2), np.ones(3)),
    "reshape": lambda: np.ones(3).reshape(2), "concatenate": lambda: np.concatenate([np.ones((1, 2)), np.ones((1, 3))]),
    "torch": lambda: torch.add(None, 1), "cat": lambda: torch.cat([1]),
}  # fmt: skip


def _unequal() -> object:
    return zip([1], [], strict=True)


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_of_python_or_its_libraries_raises_is_an_accident(name: str) -> None:
    assert blame.accident(_raised(blame.hand_over, CALLS[name]))


@pytest.mark.parametrize("function", [_refuses, _refuses_with_words_of_python, _refuses_in_compiled_code])
def test_what_an_author_may_have_decided_is_no_accident(function) -> None:
    assert not blame.accident(_raised(blame.hand_over, function))


ACCIDENT = """
import torch
def shared_expert_gate(hidden_states, gate_weight, shared_output):
    if hidden_states.shape[0] == 0:
        return None + shared_output
    return ((hidden_states.float() @ gate_weight.float().T).sigmoid() * shared_output.float()).to(shared_output.dtype)
"""


def test_an_accident_on_an_ordinary_input_fails(tmp_path: Path) -> None:
    """It was unsupported once, and the verdict PASS."""
    file = tmp_path / "accident.py"
    file.write_text(ACCIDENT)
    options = RunOptions(checks=("contract",))
    result = judge("shared_expert_gate", f"{file}:shared_expert_gate", Request(dtypes=("fp32",)), options)
    assert verdict_of(result) == "fail"
    assert "no refusal" in result["failures"][0]["message"] and "accident.py:5" in result["failures"][0]["message"]


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
    left, held, foreign = (tmp_path / f"{start.PREFIX}{name}" for name in ("left", "held", "foreign"))
    for folder in (left, held, foreign):
        folder.mkdir()
    (left / start.LOCK).touch()
    (foreign / "a user's own file").touch()
    with open(held / start.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = start.make_folder()
        assert not left.exists() and held.exists() and foreign.exists() and Path(made).exists()
    start.remove_folder(made)
    assert not Path(made).exists()
