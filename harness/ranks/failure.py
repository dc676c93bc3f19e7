"""From all that went wrong in one case to one headline: which rank, at which call, why.

When one rank fails, the others fail because of it: their connection errors and stalled collectives are secondary.
The headline is chosen by kind, never by which message came first, so that it is the same in every run.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.ranks import traces
from harness.ranks.calls import POINT_TO_POINT, Call
from harness.ranks.heartbeat import Beat, State
from harness.ranks.jobs import Reply
from harness.ranks.proof import Stalemate

KINDS = ("mismatch", "died", "exited", "raised", "collective", "deadlock", "hang", "timeout")


@dataclass(frozen=True)
class Failure:
    """What is told of a case that did not come to its end on every rank."""

    kind: str  # one of KINDS
    rank: int
    call: str
    cause: str
    secondary: tuple[str, ...] = ()
    trace: str = field(default="", repr=False)

    def headline(self) -> str:
        return f"rank {self.rank}, {self.call}: {self.cause}"


@dataclass
class Evidence:
    """What the controller holds when it stops waiting."""

    replies: dict[int, Reply] = field(default_factory=dict)
    exits: dict[int, int] = field(default_factory=dict)  # exit codes of dead workers; negative: the signal
    beats: Sequence[Beat] = ()
    stalemate: Stalemate | None = None
    stalled: tuple[int, ...] = ()  # ranks that neither compute nor wait in a collective
    seconds: float = 0.0
    logs: dict[int, str] = field(default_factory=dict)  # what dead workers wrote last


def classify(evidence: Evidence) -> Failure | None:
    """The failure that the evidence shows, or None where every rank came to its end and the traces agree."""
    for find in (_raised, _died, _mismatch, _collective, _stalemate, _hang, _timeout):
        failure = find(evidence)
        if failure is not None:
            return _with_secondary(failure, evidence)
    return None


def _raised(evidence: Evidence) -> Failure | None:
    for rank, reply in sorted(evidence.replies.items()):
        if reply.error is not None and reply.failed_call is None:
            return Failure("raised", rank, f"before call #{len(reply.calls)}", reply.error, trace=reply.trace)
    return None


def _died(evidence: Evidence) -> Failure | None:
    """A rank that died between collectives; one that died inside may be the victim of a mismatch."""
    for inside in (False, True):
        if inside and _mismatch(evidence) is not None:
            return None
        for rank, code in sorted(evidence.exits.items()):
            beat = evidence.beats[rank]
            if (beat.state == State.WAITING) is inside:
                kind, cause = ("exited", f"left with status {code}") if code >= 0 else ("died", _signal(code))
                return Failure(kind, rank, _where(beat), cause, trace=evidence.logs.get(rank, ""))
    return None


def _signal(code: int) -> str:
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _where(beat: Beat) -> str:
    if beat.state == State.WAITING:
        return f"in call {beat.call}"
    return "before call #0" if beat.call is None else f"before call #{beat.call.index + 1}, after {beat.call}"


def _mismatch(evidence: Evidence) -> Failure | None:
    complete = len(evidence.replies) == len(evidence.beats) and all(r.error is None for r in evidence.replies.values())
    found = traces.compare(_known_traces(evidence), complete=complete)
    if found is None and evidence.stalemate is not None and evidence.stalemate.kind == "mismatch":
        found = evidence.stalemate.disagreement
    if found is None:
        found = _pending_mismatch(evidence)
    return None if found is None else _from(found, "mismatch")


def _known_traces(evidence: Evidence) -> list[list[Call]]:
    """Calls of the ranks that replied; the others contribute nothing but their pending call, looked at elsewhere."""
    return [evidence.replies[rank].calls if rank in evidence.replies else [] for rank in range(len(evidence.beats))]


def _pending_mismatch(evidence: Evidence) -> traces.Disagreement | None:
    """Calls of the same number on the same group that do not fit, at least one of which never came to its end."""
    first = next((call for rank in range(len(evidence.beats)) if (call := _unfinished(evidence, rank))), None)
    if first is None or first.op in POINT_TO_POINT:
        return None
    calls = {rank: _counterpart(evidence, rank, first) for rank in first.group}
    known = {rank: call for rank, call in calls.items() if call is not None and call.group == first.group}
    return traces.disagreement(known) if len(known) == len(calls) else None


def _unfinished(evidence: Evidence, rank: int) -> Call | None:
    """The call that `rank` is stuck in or broke down in."""
    reply, beat = evidence.replies.get(rank), evidence.beats[rank]
    return reply.failed_call if reply is not None else beat.call if beat.state == State.WAITING else None


def _counterpart(evidence: Evidence, rank: int, call: Call) -> Call | None:
    reply = evidence.replies.get(rank)
    if reply is None:
        found = _unfinished(evidence, rank)
        return found if found is not None and found.index == call.index else None
    return reply.calls[call.index] if call.index < len(reply.calls) else None


def _from(found: traces.Disagreement, kind: str) -> Failure:
    where = f"call {found.call}" if found.call is not None else "after its last call"
    return Failure(kind, found.rank, where, found.cause)


def _collective(evidence: Evidence) -> Failure | None:
    if evidence.stalemate is not None:
        return None
    for rank, reply in sorted(evidence.replies.items()):
        if reply.error is not None:
            return Failure("collective", rank, f"in call {reply.failed_call}", reply.error, trace=reply.trace)
    return None


def _stalemate(evidence: Evidence) -> Failure | None:
    return None if evidence.stalemate is None else _from(evidence.stalemate.disagreement, "deadlock")


def _hang(evidence: Evidence) -> Failure | None:
    for rank in evidence.stalled:
        cause = "stopped outside any collective: it neither computes nor comes back"
        return Failure("hang", rank, _where(evidence.beats[rank]), cause)
    return None


def _timeout(evidence: Evidence) -> Failure | None:
    for rank, beat in enumerate(evidence.beats):
        if rank not in evidence.replies:
            return Failure("timeout", rank, _where(beat), f"no result after {evidence.seconds:.1f} s")
    return None


def _with_secondary(failure: Failure, evidence: Evidence) -> Failure:
    lines = []
    for rank, beat in enumerate(evidence.beats):
        reply = evidence.replies.get(rank)
        if rank == failure.rank:
            continue
        if reply is not None and reply.error is not None:
            lines.append(f"rank {rank}: {reply.error.splitlines()[0]}")
        elif rank in evidence.exits:
            lines.append(f"rank {rank}: left with status {evidence.exits[rank]}")
        elif reply is None:
            lines.append(f"rank {rank}: still {_where(beat)}")
    return Failure(failure.kind, failure.rank, failure.call, failure.cause, tuple(lines), failure.trace)
