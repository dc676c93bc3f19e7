"""From all that went wrong in one case to one headline: which rank, at which call, why.

When one rank fails, the others fail because of it: their connection errors and stalled collectives are secondary.
The headline is chosen by kind, never by which message came first, so that it is the same in every run.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_harness.harness.ranks import traces
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.jobs import Reply
from moe_harness.harness.ranks.proof import Stalemate

NOT_THE_IMPLEMENTATIONS = ("machine", "missing", "judge")
KINDS = (*NOT_THE_IMPLEMENTATIONS, "mismatch", "died", "exited", "raised", "collective", "deadlock", "stopped", "hang",
         "timeout")  # fmt: skip


@dataclass(frozen=True)
class RankFailure:
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
    beats: Sequence[RankStatus] = ()
    stalemate: Stalemate | None = None
    idle: tuple[int, ...] = ()  # ranks that, when the budget was spent, neither computed nor waited in a collective
    stopped: tuple[int, ...] = ()  # ranks whose process was stopped by a signal at that time
    computed: dict[int, float] = field(default_factory=dict)  # processor seconds since the job began of those late
    seconds: float = 0.0
    logs: dict[int, str] = field(default_factory=dict)  # what dead workers wrote last
    journals: dict[int, list[RecordedCall]] = field(default_factory=dict)  # calls of the ranks that did not reply

    def calls(self, rank: int) -> list[RecordedCall]:
        """All calls that `rank` began."""
        return self.replies[rank].calls if rank in self.replies else self.journals.get(rank, [])


def classify(evidence: Evidence) -> RankFailure | None:
    """The failure that the evidence shows, or None where every rank came to its end and the traces agree."""
    for find in (_not_theirs, _mismatch, _raised, _died, _collective, _stalemate, _stopped, _hang, _timeout):
        failure = find(evidence)
        if failure is not None:
            return _with_secondary(failure, evidence)
    return None


def _not_theirs(evidence: Evidence) -> RankFailure | None:
    """An error of the judge or of the machine, from which all else may follow."""
    for kind in NOT_THE_IMPLEMENTATIONS:
        for rank, reply in sorted(evidence.replies.items()):
            if reply.whose == kind:
                where = f"before call #{len(reply.calls)}"
                return RankFailure(kind, rank, where, reply.error or "", trace=reply.trace)
    return None


def _raised(evidence: Evidence) -> RankFailure | None:
    for rank, reply in sorted(evidence.replies.items()):
        if reply.error is not None and reply.failed_call is None:
            return RankFailure("raised", rank, f"before call #{len(reply.calls)}", reply.error, trace=reply.trace)
    return None


def _died(evidence: Evidence) -> RankFailure | None:
    for rank, code in sorted(evidence.exits.items()):
        kind, cause = ("exited", f"left with status {code}") if code >= 0 else ("died", _signal(code))
        return RankFailure(kind, rank, _where(evidence.beats[rank]), cause, trace=evidence.logs.get(rank, ""))
    return None


def _signal(code: int) -> str:
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _where(beat: RankStatus) -> str:
    if beat.state in (State.WAITING, State.OPEN):
        return f"in call {beat.call}"
    return "before call #0" if beat.call is None else f"before call #{beat.call.index + 1}, after {beat.call}"


def _mismatch(evidence: Evidence) -> RankFailure | None:
    """Calls that do not fit, of whatever ranks; looked for first, since all else may follow from it."""
    complete = len(evidence.replies) == len(evidence.beats) and all(r.error is None for r in evidence.replies.values())
    found = traces.compare([evidence.calls(rank) for rank in range(len(evidence.beats))], complete=complete)
    if found is None and evidence.stalemate is not None and evidence.stalemate.kind == "mismatch":
        found = evidence.stalemate.disagreement
    return None if found is None else _from(found, "mismatch")


def _from(found: traces.Disagreement, kind: str) -> RankFailure:
    where = f"call {found.call}" if found.call is not None else "after its last call"
    return RankFailure(kind, found.rank, where, found.cause)


def _collective(evidence: Evidence) -> RankFailure | None:
    if evidence.stalemate is not None:
        return None
    for rank, reply in sorted(evidence.replies.items()):
        if reply.error is not None:
            return RankFailure("collective", rank, f"in call {reply.failed_call}", reply.error, trace=reply.trace)
    return None


def _stalemate(evidence: Evidence) -> RankFailure | None:
    return None if evidence.stalemate is None else _from(evidence.stalemate.disagreement, "deadlock")


def _stopped(evidence: Evidence) -> RankFailure | None:
    for rank in evidence.stopped:
        cause = f"its process was stopped (SIGSTOP or SIGTSTP) and still is after {evidence.seconds:.1f} s"
        return RankFailure("stopped", rank, _where(evidence.beats[rank]), cause)
    return None


def _hang(evidence: Evidence) -> RankFailure | None:
    for rank in evidence.idle:
        cause = f"no result after {evidence.seconds:.1f} s: it sleeps, or waits for something outside any collective"
        return RankFailure("hang", rank, _where(evidence.beats[rank]), cause)
    return None


def _timeout(evidence: Evidence) -> RankFailure | None:
    """A rank outside collectives before those that wait inside one, which may be waiting for it.

    Of several outside, one that has computed: on a busy machine others may not have come to their next call yet.
    """
    much = max(evidence.computed.values(), default=0.0) / 2
    late = [(beat.state in (State.WAITING, State.OPEN), evidence.computed.get(rank, 0.0) < much, rank)
            for rank, beat in enumerate(evidence.beats) if rank not in evidence.replies]  # fmt: skip
    if not late:
        return None
    waiting, _, rank = min(late)
    busy = "" if waiting else ": it computes, or waits for something outside of collectives"
    return RankFailure("timeout", rank, _where(evidence.beats[rank]), f"no result after {evidence.seconds:.1f} s{busy}")


def _with_secondary(failure: RankFailure, evidence: Evidence) -> RankFailure:
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
    return RankFailure(failure.kind, failure.rank, failure.call, failure.cause, tuple(lines), failure.trace)
