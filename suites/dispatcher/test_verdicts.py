"""Nobody's fault is no failure, the implementation's is told as what it is, the judge's own as its own."""

import os
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.core.findings import Answer
from moe_harness.harness.core.plan import Request
from moe_harness.harness.ranks import judge
from moe_harness.harness.ranks.backend import ENOUGH_SPENT, SHORTER
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.failure import Evidence, RankFailure, classify
from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.jobs import Reply
from moe_harness.harness.ranks.pool import BUSY, STALL, _Watch
from moe_harness.harness.ranks.rank_process import Share
from moe_harness.harness.report.results import verdict_of
from moe_harness.harness.run import session
from moe_harness.harness.run.result_builder import Listener, ResultBuilder
from moe_harness.harness.run.session import RunOptions
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.harness.stages.dispatcher.faults._bases import Gathered, Rows

FILE = Path(__file__).parent / "strangers" / "unusual.py"
CASE = "dispatcher/dense/R=3,E=6,k=2,T=3+0+2"
RIGHT = ("Late", "WarmsUp", "Functional", "Method", "Threaded", "Defaults", "Silent", "OwnGroup", "Mesh", "NumpySplits")
WRONG = {
    # Who skips the sum of combine is at the next dispatch's while the others wait.
    "FunctionalSkipped": ("ranks", "mismatch: rank 2", "all_reduce", "combine"),
    "MethodSkipped": ("ranks", "mismatch: rank 2", "all_reduce", "combine"),
    "Destroyer": ("ranks", "raised", "process group"),
    "Accident": ("ranks", "raised: rank 0", "no refusal"),
    "TorchRefuses": ("ranks", "raised: rank 0", ""),
    "Interrupted": ("ranks", "raised: rank 0", "KeyboardInterrupt"),
    "Stopped": ("ranks", "stopped: rank 2", "SIGSTOP"),
    "SharedBuffer": ("dense", "dispatch 1 of 2", "combined in reverse order"),
}


def _verdict(name: str, case: str = CASE, budget: float = 20.0) -> judge.Verdict:
    return judge.judge(f"{FILE}:{name}", case, budget=budget)


@pytest.mark.parametrize("name", RIGHT)
def test_unusual_but_right(name: str) -> None:
    for number in range(3):
        verdict = _verdict(name, f"{CASE},seed={number}")
        assert verdict.passed, verdict.unsupported or verdict.findings


@pytest.mark.parametrize("name", ["Late", "WarmsUp", "Functional", "Threaded"])
def test_right_on_a_busy_machine(name: str) -> None:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        for number in range(5):
            verdict = _verdict(name, f"{CASE},seed={number}", budget=60.0)
            assert verdict.passed, verdict.findings
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_told_as_what_it_is(name: str) -> None:
    check, *words = WRONG[name]
    finding = _verdict(name, budget=3.0 if name == "Stopped" else 30.0).findings[0]
    assert finding.about == check and all(word in finding.message for word in words), finding


def test_a_call_left_out_is_not_explained_by_what_the_other_ranks_returned() -> None:
    """Here rank 1 returns zeros, since the one expert is rank 0's: that is no cause of rank 0 waiting for it."""
    finding = _verdict("FunctionalSkipped", "dispatcher/dense/R=2,E=1,k=1,T=4+4").findings[0]
    assert finding.message.startswith("mismatch: rank 1") and not finding.diagnosis, finding


def test_worlds_that_were_not_reached_were_not_refused() -> None:
    account = ResultBuilder("dispatcher", "somebody:Dispatcher", Request(), Listener(), worlds=(1, 2, 4))
    for planned in cases.plan([1, 2]):
        account.take(Answer(planned.id, "passed" if planned.case.R == 1 else "died", "deadlock"))
    result = account.result()
    assert verdict_of(result) == "fail" and not any("refused" in said["text"] for said in result["observations"])


def test_modified_inputs_are_the_cause() -> None:
    """Not the rows that changed with them, which look lost."""
    finding = _verdict("WritesHidden", "dispatcher/dense/R=2,E=4,k=1,T=3+2").findings[0]
    assert finding.about == "inputs" and finding.diagnosis[0]["fault"] == "input modified in place", finding


@pytest.mark.parametrize(("name", "words"), [("BreaksTheJudge", "the harness failed"), ("FullDisk", "this machine")])
def test_what_the_judge_or_the_machine_does_wrong_is_not_judged(name: str, words: str) -> None:
    with pytest.raises(CannotJudge, match=words):
        _verdict(name)
    assert _verdict("Method").passed


def _run(name: str, worlds: tuple[int, ...], **options: object) -> dict:
    return session.judge("dispatcher", f"{FILE}:{name}", Request(), RunOptions(**options), worlds=worlds)


def test_no_pass_without_a_case_at_every_world_size() -> None:
    result = _run("OneRankOnly", (1, 2))
    assert verdict_of(result) == "unsupported"
    assert any("2 ranks" in said["text"] for said in result["observations"])
    assert verdict_of(_run("OneRankOnly", (1,))) == "pass"


@pytest.mark.parametrize(
    ("refused", "verdict"),
    [(lambda case: case.core() and case.R == 2, "unsupported"), (lambda case: case.core() and case.T == "5+5",
     "unsupported"), (lambda case: len(set(case.tokens)) > 1, "pass"), (lambda case: case.dtype == "fp16", "pass"),
     (lambda case: case.owner != "block" or case.groups > 1, "pass")],
    ids=["two ranks", "a core case in every dtype", "uneven tokens", "a dtype", "other owners"],
)  # fmt: skip
def test_what_nobody_needs_to_refuse_is_judged_in_some_dtype_or_nothing_passes(refused, verdict: str) -> None:
    account = ResultBuilder("dispatcher", "somebody:Dispatcher", Request(), Listener())
    for planned in cases.plan([1, 2, 4]):
        status, reason = ("unsupported", "not here") if refused(planned.case) else ("passed", None)
        account.take(Answer(planned.id, status, reason))
    result = account.result()
    assert verdict_of(result) == verdict
    assert any(said["name"] == "core" for said in result["observations"]) is (verdict == "unsupported")


def test_the_case_that_nobody_needs_to_refuse_is_named() -> None:
    """Also where it is the only one, and not one that may be refused."""
    account = ResultBuilder("dispatcher", "somebody:Dispatcher", Request(), Listener())
    only = next(planned for planned in cases.plan([2]) if planned.check == "dense" and planned.case.core())
    may = next(planned for planned in cases.plan([2]) if planned.check == "dense" and not planned.case.core())
    for planned in (may, only):
        account.take(Answer(planned.id, "unsupported", "not here"))
    (told,) = [said["text"] for said in account.result()["observations"] if said["name"] == "core"]
    assert told.startswith("1 ") and told.endswith(f"refused, as {only.id}")


def test_only_the_checks_that_are_asked_for() -> None:
    result = _run("Method", (2,), checks=("live",))
    assert [check["name"] for check in result["checks"]] == ["live"] and verdict_of(result) == "pass"


def test_one_failure_or_the_cases_that_are_named() -> None:
    """--fail-fast and --last-failed."""
    result = _run("SharedBuffer", (2,), fail_fast=True)
    assert len(result["failures"]) == 1
    result = _run("SharedBuffer", (2,), cases=(result["failures"][0]["case"],))
    assert len(result["failures"]) == 1 and sum(check["cases"] for check in result["checks"]) == 1


def test_a_process_left_behind_is_ended_and_told() -> None:
    result = _run("Parent", (2,), checks=("live",))
    told = [said["text"] for said in result["observations"] if said["name"] == "left running"]
    assert len(told) == 1 and "sleep 4321" in told[0]
    alive = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if _exists(p)]
    assert not any(b"4321" in line for line in alive)
    assert verdict_of(result) == "pass"


def _exists(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def test_a_rank_that_hangs_ends_the_run_soon() -> None:
    result = _run("Stopped", (2,), timeout=2.0, checks=("dense",))
    assert verdict_of(result) == "fail" and len(result["failures"]) == ENOUGH_SPENT
    assert result["seconds"] < 2.0 + 2.0 / SHORTER * 2 + 10


# Pure --------------------------------------------------------------------------------------------------------------


def test_who_has_replied_does_not_hang() -> None:
    """The evidence is of the moment of the verdict, whatever was seen before."""
    call = RecordedCall(index=0, op="all_reduce", group=(0, 1), dtype="float32", inputs=((2,),))
    done = Evidence(
        replies={0: Reply(calls=[call]), 1: Reply(calls=[call])},
        beats=[RankStatus(4, State.DONE), RankStatus(4, State.DONE)],
    )
    assert classify(done) is None
    late = Evidence(
        replies={0: Reply(calls=[call])}, beats=[RankStatus(4, State.DONE), RankStatus(4, State.RUNNING)], idle=(1,)
    )
    failure = classify(late)
    assert failure is not None and (failure.kind, failure.rank) == ("hang", 1)


def test_planned_cases_hold_large_batches_and_many_experts() -> None:
    plan = [case for _, case in cases.plan((1, 2, 3, 4))]
    for ranks in (1, 2, 3, 4):
        of_world = [case for case in plan if ranks == case.R]
        assert {256, 257, 513} <= {n for case in of_world for n in case.tokens}
        assert any(case.E == 1025 for case in of_world)


class ReturnsItsTokens(Gathered):
    """What is combined is never looked at."""

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Rows:
        d = super().dispatch(hidden_states, topk_weights, topk_ids)
        self.given = {**getattr(self, "given", {}), id(d): (d, hidden_states)}
        return d

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        return self.given[id(d)][1].clone()


class ReturnsZeros(Gathered):
    def combine(self, out: Tensor, d: Rows) -> Tensor:
        return torch.zeros_like(super().combine(out, d))


@pytest.mark.parametrize(("name", "cause"), [("ReturnsItsTokens", "input_copied"), ("ReturnsZeros", "all_zeros")])
def test_a_plain_result_on_every_rank_has_its_own_name_and_no_other(name: str, cause: str) -> None:
    options = RunOptions(cases=("dispatcher/dense/R=2,E=4,k=2,T=3+3",))
    result = session.judge("dispatcher", f"{__name__}:{name}", Request(), options, worlds=(2,))
    assert [entry["fault"] for entry in result["failures"][0]["diagnosis"]] == [cause]


def test_what_other_ranks_tell_of_a_failure_is_no_cause_of_it() -> None:
    """It named the cluster once: "secondary error: 1 of 1 cases"."""
    outcome = RankFailure(
        "deadlock", 0, "after its last call", "has finished", secondary=("rank 1: still in call #12",)
    )
    finding = judge._from_failure(outcome)
    assert not finding.diagnosis and finding.looks_like == ["elsewhere, rank 1: still in call #12"]


class Kept:
    """A worker of which nothing comes, and that has `waited` for a processor in each second of the job."""

    def __init__(self, waited: float):
        self.waited, self.buffered, self.began = waited, [], time.monotonic()
        self.end, self.other = Pipe()

    def beat(self) -> RankStatus:
        return RankStatus(2, State.RUNNING, None, job=1)

    def share(self) -> Share:
        passed = time.monotonic() - self.began
        return Share(passed * (1 - self.waited), passed * self.waited)

    def ticks(self) -> None:
        return None

    def is_stopped(self) -> bool:
        return False


@pytest.mark.parametrize(("waited", "budgets"), [(0.0, 1), (0.5, 2), (0.99, BUSY)])
def test_waiting_for_a_processor_is_not_taken_from_the_budget(waited: float, budgets: int) -> None:
    began = time.monotonic()
    evidence = _Watch([Kept(0.0), Kept(waited)], 1, 0.1).wait()  # type: ignore[list-item]
    assert time.monotonic() - began >= 0.1 * budgets * 0.95
    assert set(evidence.computed) == {0, 1}


@pytest.mark.parametrize(
    ("ticks", "idle"), [((7, 7, 8), True), ((7, 8, 9), False), ((2, 9, 9), False), ((7, None, 7), False)]
)
def test_idle_is_who_slept_at_every_look(ticks: tuple[int | None, ...], idle: bool) -> None:
    """A rank that computes is none that hangs; a tick of the processor may belong to what was before."""
    member, said = Kept(0.0), iter(ticks)
    member.ticks = lambda: next(said)  # type: ignore[assignment, method-assign, return-value]
    watch = _Watch([member], 1, 60.0)  # type: ignore[list-item]
    seen = [watch._is_idle(0, 1000.0 + part * STALL) for part in (0, 0.5, 1)]
    assert seen == [False, False, idle]


def test_what_was_before_the_last_moments_is_forgotten() -> None:
    member, said = Kept(0.0), iter((2, 9, 9, 9))
    member.ticks = lambda: next(said)  # type: ignore[assignment, method-assign]
    watch = _Watch([member], 1, 60.0)  # type: ignore[list-item]
    assert [watch._is_idle(0, part * STALL) for part in (0, 0.5, 1, 1.5)] == [False, False, False, True]


def test_late_is_who_computes_not_who_has_not_had_a_processor() -> None:
    """Rank 0 has not come to its first call for others than the implementation."""
    running = RankStatus(2, State.RUNNING, None, job=1)
    failure = classify(Evidence(beats=[running, running, running], computed={0: 0.1, 1: 4.1, 2: 4.2}))
    assert failure is not None and (failure.kind, failure.rank) == ("timeout", 1)
