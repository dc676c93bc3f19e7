"""Strangers' files: right is never failed, wrong never passed, and the message says who, where and why."""

from pathlib import Path

import pytest

from moe_harness.harness.core.errors import HarnessError
from moe_harness.harness.core.plan import Request
from moe_harness.harness.ranks import judge
from moe_harness.harness.ranks.backend import ENOUGH
from moe_harness.harness.ranks.pool import BUDGET
from moe_harness.harness.report.results import verdict_of
from moe_harness.harness.run import session
from moe_harness.harness.run.result_builder import Listener, ResultBuilder
from moe_harness.harness.run.session import RunOptions
from moe_harness.harness.stages.parallel_linear.rank_task import kind_of
from moe_harness.suites.dispatcher.strangers import wrong

FOLDER = Path(__file__).parent / "strangers"
# And over how many ranks: both numbers where it takes some cases only, or does not look the same over an odd one.
RIGHT = {
    "Padded": (3,), "Pickled": (2,), "Letters": (3,), "Overlapped": (2,), "Wide": (3,), "OneAtATime": (2,),
    "EvenOnly": (2, 3), "Same": (2, 3), "HalfOnly": (2, 3),
}  # fmt: skip


LAYERS = ("MyColumnParallel", "MyReplicatedLinear", "RowSharded", "GateUpMergedColumn")


def _judge(file: str, name: str, stage: str = "dispatcher", worlds: tuple[int, ...] = (2, 3)) -> dict:
    spec = f"{FOLDER / file}:{name}"
    return session.judge(stage, spec, Request(), RunOptions(), worlds=worlds)


def _first_message(name: str, stage: str) -> str:
    """What is told first of a file that is wrong; only for one that never ends is the budget waited for."""
    budget = 5.0 if name in wrong.NEVER_END else BUDGET
    spec = f"{FOLDER / 'wrong.py'}:{name}"
    for case in judge.planned(stage, spec, (1, 2, 3)):
        for finding in judge.judge(spec, case, budget=budget).findings:
            return finding.message
    raise AssertionError(f"{name} survives")


def test_a_layer_of_partial_sums_is_row_parallel_by_any_name() -> None:
    assert kind_of(type("Down", (), {"output": "partial"})) == "row"


@pytest.mark.parametrize("name", RIGHT)
def test_right_is_passed(name: str) -> None:
    result = _judge("right.py", name, worlds=RIGHT[name])
    assert verdict_of(result) == "pass", [f["message"] for f in result["failures"][:3]]


@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_are_passed(name: str) -> None:
    result = _judge("right.py", name, "parallel_linear")
    assert verdict_of(result) == "pass", [f["message"] for f in result["failures"][:3]]


@pytest.mark.parametrize("name", wrong.SAID)
def test_wrong_is_failed_with_its_cause(name: str) -> None:
    told = _first_message(name, "dispatcher")
    assert wrong.SAID[name] in told, told


@pytest.mark.parametrize("name", wrong.SAID_OF_LAYERS)
def test_wrong_layers_are_failed(name: str) -> None:
    told = _first_message(name, "parallel_linear")
    assert wrong.SAID_OF_LAYERS[name] in told, told


def test_a_dispatcher_that_ends_every_process_ends_the_run() -> None:
    """Each case would cost new processes; what was not judged is told."""
    result = _judge("wrong.py", "Brittle")
    assert verdict_of(result) == "fail" and len(result["failures"]) == ENOUGH
    assert {"dense", "live"} <= {entry["what"] for entry in result["coverage"]["skipped"]}


def test_a_planned_case_that_was_not_judged_keeps_a_run_from_passing() -> None:
    heard = ResultBuilder("dispatcher", "a.py:Right", Request(), Listener(), worlds=(2,))
    dense, live = "dispatcher/dense/R=2,E=4,k=2,T=3+3", "dispatcher/live/R=2,E=4,k=2,T=3+3"
    heard.expect([dense, live])
    heard.take(judge.Verdict(case=dense).answer())
    assert heard.result()["verdict"] == "error"
    assert {"what": "live", "reason": "not judged", "cases": 1} in heard.result()["coverage"]["skipped"]
    heard.take(judge.Verdict(case=live).answer())
    assert heard.result()["verdict"] == "pass"


@pytest.mark.parametrize(
    ("name", "words"),
    [("a_function", "num_experts"), ("A_NUMBER", "is int"), ("Positional", "num_experts"), ("Missing", "Missing")],
)
def test_what_the_contract_cannot_make_is_a_wrong_call(name: str, words: str) -> None:
    with pytest.raises(HarnessError, match=words):
        _judge("wrong.py", name)
