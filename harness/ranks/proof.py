"""From what the ranks said last to a proof that they will never go on.

Without progress nothing is proved by time alone: a transfer may be slow.  What proves a stalemate is that nobody is
left who could move: every rank either waits in a call, or is done, or is dead, and some pending call cannot complete
because a member of its group is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from harness.ranks.calls import POINT_TO_POINT, Call
from harness.ranks.heartbeat import Beat, State
from harness.ranks.traces import Disagreement, disagreement


@dataclass(frozen=True)
class Stalemate:
    """A proof: `kind` is "deadlock" (a member is absent) or "mismatch" (members are in different calls)."""

    kind: str
    disagreement: Disagreement


def of_job(beats: Sequence[Beat], number: int) -> list[Beat]:
    """The beats as they stand for job `number`: a rank that has not begun it may still do anything."""
    return [beat if beat.job == number else Beat(beat.sequence, State.RUNNING) for beat in beats]


def stalemate(beats: Sequence[Beat], dead: frozenset[int] = frozenset()) -> Stalemate | None:
    """The proof that no rank can go on, or None where one still might."""
    if any(beat.state == State.RUNNING and rank not in dead for rank, beat in enumerate(beats)):
        return None
    pending = {r: b.call for r, b in enumerate(beats) if r not in dead and b.state == State.WAITING and b.call}
    for rank, call in pending.items():
        found = _unmatched(rank, call, pending, dead)
        if found is not None:
            return found
    return None


def _unmatched(rank: int, call: Call, pending: dict[int, Call], dead: frozenset[int]) -> Stalemate | None:
    members = (rank, call.root) if call.op in POINT_TO_POINT else call.group
    for member in members:
        if member is None or member in pending:
            continue
        gone = "is dead" if member in dead else "has finished its task"
        cause = f"{gone}, while rank {rank} waits for it in call {call}"
        return Stalemate("deadlock", Disagreement(member, None, cause, {rank: str(call)}))
    if call.op in POINT_TO_POINT:
        return _message(rank, call, pending)
    calls = {member: pending[member] for member in members}
    elsewhere = next((r for r, other in calls.items() if other.group != call.group), None)
    if elsewhere is not None:
        cause = f"waits on other ranks than rank {rank}, which is in call {call}"
        return Stalemate("mismatch", Disagreement(elsewhere, calls[elsewhere], cause, {rank: str(call)}))
    found = disagreement(calls)
    return None if found is None else Stalemate("mismatch", found)


def _message(rank: int, call: Call, pending: dict[int, Call]) -> Stalemate | None:
    peer = pending[call.root]  # type: ignore[index]
    wanted = "recv" if "send" in call.op else "send"
    if wanted in peer.op and peer.root == rank:
        return None
    cause = f"is in another call, while rank {rank} waits for it in call {call}"
    return Stalemate("deadlock", Disagreement(call.root, peer, cause, {rank: str(call)}))  # type: ignore[arg-type]
