"""From what the ranks said last, and the calls they have begun, to a proof that they will never go on.

Without progress nothing is proved by time alone: a transfer may be slow, and on a busy machine a rank may leave a call
long before another does.  A call is answered once every other member of its group has begun the call that belongs to
it, the n-th on the same group: then it only takes time.  What proves a stalemate is a call whose answers disagree, or
one that waits for a rank that is done, dead, or itself waits for such a rank, in a circle or not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_harness.harness.ranks.calls import POINT_TO_POINT, RecordedCall
from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.traces import Disagreement, disagreement


@dataclass(frozen=True)
class Stalemate:
    """A proof: `kind` is "deadlock" (a member is absent) or "mismatch" (members are in different calls)."""

    kind: str
    disagreement: Disagreement


def of_job(beats: Sequence[RankStatus], number: int) -> list[RankStatus]:
    """The beats as they stand for job `number`: a rank that has not begun it may still do anything."""
    return [beat if beat.job == number else RankStatus(beat.sequence, State.RUNNING) for beat in beats]


Begun = Callable[[int], Sequence[RecordedCall]]


def stalemate(
    beats: Sequence[RankStatus], dead: frozenset[int] = frozenset(), begun: Begun | None = None
) -> Stalemate | None:
    """The proof that some rank can never go on, or None where all still might.

    Args:
        dead: ranks whose process is gone.
        begun: all calls that a rank has begun; by default the pending one alone.
    """
    if any(beat.state in (State.RUNNING, State.OPEN) and rank not in dead for rank, beat in enumerate(beats)):
        return None
    pending = {r: b.call for r, b in enumerate(beats) if r not in dead and b.state == State.WAITING and b.call}
    calls = {rank: begun(rank) if begun else [c for c in [beats[rank].call] if c] for rank in range(len(beats))}
    missing: dict[int, list[int]] = {}  # for each pending rank, those it waits for
    for rank, call in pending.items():
        answers = {member: _answer(rank, call, calls, member) for member in _members(rank, call)}
        given = {member: answer for member, answer in answers.items() if answer is not None}
        missing[rank] = [member for member, answer in answers.items() if answer is None]
        found = disagreement(given) if call.op not in POINT_TO_POINT and not missing[rank] else None
        if found is not None:
            return Stalemate("mismatch", found)
    free = _free(missing)
    return next((_waits(rank, pending, missing, free, dead) for rank in missing if rank not in free), None)


def _members(rank: int, call: RecordedCall) -> tuple[int, ...]:
    return (rank, call.root) if call.op in POINT_TO_POINT else call.group  # type: ignore[return-value]


def _answer(
    rank: int, call: RecordedCall, calls: dict[int, Sequence[RecordedCall]], member: int
) -> RecordedCall | None:
    """The call of `member` that belongs to `call` of `rank`; None where it has not begun it."""
    if member == rank:
        return call
    if call.op in POINT_TO_POINT:  # the n-th send meets the n-th receive
        own, other = ("send", "recv") if call.op == "send" else ("recv", "send")
        before = [c for c in calls[rank] if c.op == own and c.root == member and c.index < call.index]
        answers = [c for c in calls[member] if c.op == other and c.root == rank]
        if anybody := next((c for c in calls[member] if c.op == "recv_any"), None):  # it may have taken this one
            return anybody
    else:
        before = [c for c in _on_group(calls[rank], call.group) if c.index < call.index]
        answers = _on_group(calls[member], call.group)
    return answers[len(before)] if len(answers) > len(before) else None


def _on_group(calls: Sequence[RecordedCall], group: tuple[int, ...]) -> list[RecordedCall]:
    return [call for call in calls if call.group == group and call.op not in POINT_TO_POINT]


def _free(missing: dict[int, list[int]]) -> set[int]:
    """Ranks whose call is answered, or will be once others of them have gone on."""
    free: set[int] = set()
    while more := {rank for rank, others in missing.items() if rank not in free and set(others) <= free}:
        free |= more
    return free


def _waits(
    rank: int, pending: dict[int, RecordedCall], missing: dict[int, list[int]], free: set[int], dead: frozenset[int]
) -> Stalemate:
    """What keeps `rank`: a rank that is gone for good before one that is stuck elsewhere."""
    call = pending[rank]
    member = min((m for m in missing[rank] if m not in free), key=lambda m: (m in pending, m))
    told = {rank: str(call)}
    if member not in pending:
        gone = "is dead" if member in dead else "has finished its task"
        cause = f"{gone}, while rank {rank} waits for it in call {call}"
        return Stalemate("deadlock", Disagreement(member, None, cause, told))
    where = pending[member]
    if call.op not in POINT_TO_POINT and where.op not in POINT_TO_POINT and where.group != call.group:
        cause = f"waits on other ranks than rank {rank}, which is in call {call}"
        return Stalemate("mismatch", Disagreement(member, where, cause, told))
    cause = f"is in another call, while rank {rank} waits for it in call {call}"
    return Stalemate("deadlock", Disagreement(member, where, cause, told))
