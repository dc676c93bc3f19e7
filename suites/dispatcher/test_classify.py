"""From all that went wrong in one case to one headline: its kind, the rank that began it, what followed elsewhere."""

from typing import Any

import pytest

from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.failure import Evidence, classify
from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.jobs import Reply
from moe_harness.harness.ranks.proof import Stalemate
from moe_harness.harness.ranks.traces import Disagreement

CALL = RecordedCall(index=0, op="all_reduce", group=(0, 1, 2), dtype="float32", inputs=((2,),))
NEXT = RecordedCall(index=1, op="all_reduce", group=(0, 1, 2), dtype="float32", inputs=((2,),))
WAITS, RUNS = RankStatus(4, State.WAITING, CALL), RankStatus(4, State.RUNNING, CALL)
FRESH, DONE = RankStatus(1, State.RUNNING), RankStatus(4, State.DONE, CALL)


def told(beats: list[RankStatus], **evidence: Any) -> tuple[str, int, str, str]:
    failure = classify(Evidence(beats=beats, **evidence))
    assert failure is not None
    return failure.kind, failure.rank, failure.call, failure.cause


def reply(error: str | None = None, **fields: Any) -> Reply:
    return Reply(error=error, calls=[CALL], **fields)


def test_a_rank_that_raises_is_told_before_one_whose_collective_then_fails() -> None:
    """Whichever replied first, and whichever has the smaller number."""
    echo = reply("RuntimeError: connection closed", failed_call=CALL)
    broken = {2: reply("KeyError: 3"), 1: reply("KeyError: 4"), 0: echo}
    assert told([DONE] * 3, replies=broken) == ("raised", 1, "before call #1", "KeyError: 4")
    kind, rank, where, _ = told([DONE] * 3, replies={0: reply(), 1: echo, 2: reply()})
    assert (kind, rank) == ("collective", 1) and where == f"in call {CALL}"


@pytest.mark.parametrize("whose", ["machine", "missing", "judge"])
def test_what_is_not_the_implementations_comes_before_all_else(whose: str) -> None:
    replies = {0: reply("KeyError: 3"), 1: reply("OSError: no space", whose=whose)}
    assert told([DONE] * 3, replies=replies, exits={2: -9}) == (whose, 1, "before call #1", "OSError: no space")


@pytest.mark.parametrize(
    ("code", "kind", "cause"),
    [(3, "exited", "left with status 3"), (0, "exited", "left with status 0"), (-9, "died", "was killed by SIGKILL"),
     (-1, "died", "was killed by SIGHUP"), (-99, "died", "was killed by signal 99")],
)  # fmt: skip
def test_a_process_that_has_ended_is_told_with_its_status(code: int, kind: str, cause: str) -> None:
    failure = classify(Evidence(beats=[WAITS, RUNS, FRESH], exits={2: code, 1: code}, logs={1: "its last words"}))
    assert failure is not None and (failure.kind, failure.rank, failure.cause) == (kind, 1, cause)
    assert failure.call == f"before call #1, after {CALL}" and failure.trace == "its last words"
    assert failure.headline() == f"rank 1, {failure.call}: {cause}"
    assert failure.secondary == (f"rank 0: still in call {CALL}", f"rank 2: left with status {code}")


def test_what_the_other_ranks_say_follows_in_one_line_each() -> None:
    replies = {0: reply("RuntimeError: closed\nby peer", failed_call=CALL), 1: reply("KeyError: 3")}
    failure = classify(Evidence(beats=[DONE, DONE, FRESH, DONE], replies={**replies, 3: reply()}))
    assert failure is not None and failure.rank == 1
    assert failure.secondary == ("rank 0: RuntimeError: closed", "rank 2: still before call #0")


def test_of_those_that_do_not_come_the_stopped_are_told_before_the_idle_and_the_late() -> None:
    beats, late = [WAITS, RUNS, FRESH], {"seconds": 7.25, "computed": {0: 0.0, 1: 7.0, 2: 0.1}}
    kind, rank, where, cause = told(beats, stopped=(2,), idle=(1, 2), **late)
    assert (kind, rank, where) == ("stopped", 2, "before call #0") and "still is after 7.2 s" in cause
    kind, rank, _, cause = told(beats, idle=(1, 2), **late)
    assert (kind, rank) == ("hang", 1) and cause.startswith("no result after 7.2 s: it sleeps")
    assert told(beats, **late)[:2] == ("timeout", 1) and told(beats, **late)[3].endswith("outside of collectives")
    assert told([WAITS, WAITS, DONE], replies={2: reply()}, seconds=7.0) == (
        "timeout", 0, f"in call {CALL}", "no result after 7.0 s"
    )  # fmt: skip


def test_of_several_that_compute_the_late_one_has_done_much_of_the_work() -> None:
    """Rank 0 has hardly begun: on a busy machine that is no fault of its own."""
    assert told([RUNS] * 3, seconds=7.0, computed={0: 1.0, 1: 4.0, 2: 7.0})[:2] == ("timeout", 1)


@pytest.mark.parametrize("kind", ["mismatch", "deadlock"])
@pytest.mark.parametrize(("call", "where"), [(CALL, f"call {CALL}"), (None, "after its last call")])
def test_what_is_proved_never_to_come_is_told_as_the_proof_has_it(
    kind: str, call: RecordedCall | None, where: str
) -> None:
    proof = Stalemate(kind, Disagreement(1, call, "it has finished"))
    echo = {2: reply("RuntimeError: closed", failed_call=CALL)}
    assert told([WAITS, DONE, DONE], replies=echo, stalemate=proof) == (kind, 1, where, "it has finished")


def test_ranks_that_came_to_their_end_and_agree_have_not_failed() -> None:
    assert classify(Evidence(beats=[DONE] * 3, replies={rank: reply() for rank in range(3)})) is None
    more = {0: reply(), 1: Reply(calls=[CALL, NEXT]), 2: reply()}
    assert told([DONE] * 3, replies=more)[0] == "mismatch"
