"""The controller: a pool of workers per (world size, backend), one job at a time, a clean pool after every failure.

    outcome = pool.run("package.module:task", {"any": "plain spec"}, ranks=2, seed=0)
    outcome.results      what the task returned on each rank
    outcome.failure      one headline and the secondary errors, where a rank did not come to its end

The controller imports no torch.  A deadlock is proved after 150 ms without progress (see `harness.ranks.proof`).  Where
nothing is proved, a rank that sleeps or computes has all of its budget, and what is told is how it is when that ends.
Time in which a rank was ready to run and other processes had the processors is not taken from the budget.
"""

import atexit
import os
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from moe_harness.harness.core import blame
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.process.start import make_folder, remove_folder
from moe_harness.harness.ranks import remote
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.failure import Evidence, RankFailure, classify
from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.jobs import Exit, Home, Injection, Job
from moe_harness.harness.ranks.proof import of_job, stalemate
from moe_harness.harness.ranks.rank_process import LocalMember, RankProcess, Share, wait

PATIENCE = 0.15  # seconds without progress before a proof is looked for
STALL = 0.5  # seconds at the end in which no thread of a rank wanted a processor: then it is told to do nothing
TICK = 1.0  # seconds that one look may take of the budget: more pass only where this process was stopped itself
BUDGET = 60.0  # seconds a case may take in all
BUSY = 5  # budgets that it may take on a machine so busy that its ranks wait for a processor
START = 60.0  # seconds a pool may take to start, the first import of torch included
LOAD = 180.0  # seconds an implementation may take to be imported
POLL = 0.02


@dataclass(frozen=True)
class JobOutcome:
    """What became of one job."""

    results: list[Any] = field(default_factory=list)
    traces: list[list[RecordedCall]] = field(default_factory=list)
    failure: RankFailure | None = None
    seconds: float = 0.0
    left: tuple[str, ...] = ()  # processes that the ranks had left running when a failure ended them

    @property
    def ok(self) -> bool:
        return self.failure is None


class RankPool:
    """The workers of one world."""

    def __init__(self, world_size: int, backend: str):
        self.world_size, self.backend, self.ready = world_size, backend, False
        self.directory = os.getcwd()  # the workers', in which they look for files that a spec names
        self.jobs = 0
        self.loaded: set[tuple[str, str]] = set()  # (stage, spec) of what the workers have imported
        self.folder, self.heartbeat = "", None
        if os.environ.get(remote.ADDRESS):
            self.members: list[RankProcess] = list(remote.start(world_size, backend, START))
            return
        with blame.judging():
            self.folder = make_folder()
            home = Home(self.folder, world_size, backend)
            self.heartbeat = home.heartbeat(create=True)
            self.members = [LocalMember(rank, home, self.heartbeat) for rank in range(world_size)]

    def wait_ready(self) -> None:
        """Return when every worker has joined the group.

        Raises:
            CannotJudge: a worker died or did not answer in time.
        """
        deadline = time.monotonic() + START
        missing = {} if self.ready else dict(enumerate(self.members))
        while missing:
            ready = wait(list(missing.values()), max(0.0, deadline - time.monotonic()))
            for rank, member in list(missing.items()):
                answer = member.receive() if member in ready else None
                if answer == "ready":
                    del missing[rank]
                elif isinstance(answer, Exit) or not ready:
                    told = f"rank {rank} of {self.world_size} did not start on {self.backend}"
                    raise CannotJudge(f"{told}\n{member.said()}")
        self.ready = True

    def run(self, job: Job, budget: float = BUDGET) -> JobOutcome:
        """Run `job` on every rank.  A pool that yields a failure must not be used again."""
        self.wait_ready()
        start = time.monotonic()
        self.jobs += 1
        for member in self.members:
            member.send(replace(job, number=self.jobs))
        evidence = _Watch(self.members, self.jobs, budget).wait()
        evidence.seconds = time.monotonic() - start
        evidence.logs = {rank: self.members[rank].said() for rank in evidence.exits}
        ranks = range(self.world_size)
        evidence.journals = {rank: self.members[rank].calls() for rank in ranks if rank not in evidence.replies}
        replies = [evidence.replies.get(rank) for rank in ranks]
        return JobOutcome(
            [None if reply is None else reply.result for reply in replies],
            [evidence.calls(rank) for rank in ranks],
            classify(evidence),
            evidence.seconds,
        )

    def load(self, stage: str, spec: str) -> JobOutcome | None:
        """Import an implementation on every rank; what went wrong, if anything did."""
        if (stage, spec) in self.loaded:
            return None
        self.loaded.add((stage, spec))
        outcome = self.run(Job("moe_harness.harness.core.ranked_subject:warm", {"stage": stage, "impl": spec}), LOAD)
        return None if outcome.ok else outcome

    def close(self) -> list[str]:
        """End the workers at once, and all that they have started; returns what that was, by rank."""
        left = [f"rank {rank}: {words}" for rank, member in enumerate(self.members) for words in member.close()]
        if self.heartbeat is not None:
            self.heartbeat.close()
            remove_folder(self.folder)
        return left


class _Watch:
    """Waits for the replies to one job and stops as soon as it is proved that some will never come."""

    def __init__(self, members: list[RankProcess], number: int, budget: float):
        self.members, self.number, self.evidence = members, number, Evidence()
        self.left, self.looked = budget, time.monotonic()
        self.began, self.shares = self.looked, [member.share() for member in members]
        self.granted = 0.0  # seconds given beside the budget
        self.open = dict(enumerate(members))
        self.sequences: list[int] = []
        self.moved = time.monotonic()  # when a sequence number last changed
        self.asleep: dict[int, deque[tuple[float, int]]] = {}  # rank -> when it was seen asleep, its processor ticks

    def wait(self) -> Evidence:
        while self.open and not self._over():
            for member in wait(list(self.open.values()), POLL):
                self._receive(next(rank for rank, known in self.open.items() if known is member))
        self.evidence.beats = self._beats()
        return self.evidence

    def _receive(self, rank: int) -> None:
        message = self.open[rank].receive()
        if message is None:
            return
        del self.open[rank]
        if isinstance(message, Exit):
            self.evidence.exits[rank] = message.code
        else:
            self.evidence.replies[rank] = message
        self.moved = time.monotonic()

    def _beats(self) -> list[RankStatus]:
        return of_job([member.beat() for member in self.members], self.number)

    def _over(self) -> bool:
        now, beats = time.monotonic(), self._beats()
        sequences = [beat.sequence for beat in beats]
        if sequences != self.sequences:
            self.sequences, self.moved = sequences, now
        self.left -= min(now - self.looked, TICK)
        self.looked = now
        if self.left <= 0:
            self.left += self._kept_waiting(now)
        if now - self.moved < PATIENCE and self.left > 0:
            return False
        idle = [rank for rank in self.open if self._is_idle(rank, now)]
        proof = stalemate(beats, frozenset(self.evidence.exits), lambda rank: self.members[rank].calls())
        if proof is not None and self._still(sequences):
            self.evidence.stalemate = proof
            return True
        if now - self.moved >= PATIENCE and self._is_lost():
            return True
        if self.left > 0:
            return False
        self.evidence.idle = tuple(rank for rank in idle if beats[rank].state != State.WAITING)
        self.evidence.stopped = tuple(rank for rank in self.open if self.members[rank].is_stopped())
        self.evidence.computed = {rank: self._since_the_job(rank).ran for rank in self.open}
        return True

    def _since_the_job(self, rank: int) -> Share:
        """What `rank` has had of the processors since then; nothing where that is not known."""
        before, now = self.shares[rank], self.members[rank].share()
        if before is None or now is None:
            return Share(0.0, 0.0)
        return Share(now.ran - before.ran, now.waited - before.waited)

    def _kept_waiting(self, now: float) -> float:
        """Seconds for which a rank waited for a processor, without those granted before."""
        waited = max((self._since_the_job(rank).waited for rank in self.open), default=0.0)
        more = min(waited, (now - self.began) * (1 - 1 / BUSY)) - self.granted
        self.granted += max(0.0, more)
        return max(0.0, more)

    def _is_lost(self) -> bool:
        """Whether a rank is dead or has raised: the case has failed, whatever the others still do."""
        return bool(self.evidence.exits) or any(reply.error is not None for reply in self.evidence.replies.values())

    def _still(self, sequences: list[int]) -> bool:
        """Whether nothing has moved by now either: what remote ranks said may have come late."""
        for member in self.open.values():
            member.refresh()
        return [member.beat().sequence for member in self.members] == sequences and not any(
            member.buffered for member in self.open.values()
        )

    def _is_idle(self, rank: int, now: float) -> bool:
        """Whether the process slept, with all its threads, at every look of the last STALL seconds."""
        ticks, seen = self.members[rank].ticks(), self.asleep.setdefault(rank, deque())
        if ticks is None:
            seen.clear()
            return False
        seen.append((now, ticks))
        while len(seen) > 1 and seen[1][0] <= now - STALL:
            seen.popleft()
        return seen[0][0] <= now - STALL and ticks - seen[0][1] <= 1  # a tick may belong to what was before


_POOLS: dict[tuple[int, str], RankPool] = {}


def run(
    task: str,
    spec: Any,
    *,
    ranks: int,
    seed: int = 0,
    backend: str = "gloo",
    injection: Injection | None = None,
    budget: float = BUDGET,
    load: tuple[str, str] | None = None,
) -> JobOutcome:
    """Run `task` ("package.module:function", called with (Rank, spec, seed)) on every rank of a pool.

    `load` names the stage and spec of an implementation that is imported first, which is no part of the budget.

    A failed pool is replaced at once; the new workers start while the caller looks at the outcome.
    """
    if os.environ.get(remote.ADDRESS):  # a server holds one worker, so pools of other sizes have to go first
        for other in [known for known in _POOLS if known != (ranks, backend)]:
            _POOLS.pop(other).close()
    known = _POOLS.get((ranks, backend))
    if known is not None and known.directory != os.getcwd():
        _POOLS.pop((ranks, backend)).close()
    pool = _POOLS.get((ranks, backend)) or _POOLS.setdefault((ranks, backend), RankPool(ranks, backend))
    try:
        outcome = (pool.load(*load) if load is not None else None) or pool.run(Job(task, spec, seed, injection), budget)
    except BaseException:
        _POOLS.pop((ranks, backend)).close()
        raise
    if not outcome.ok:
        outcome = replace(outcome, left=tuple(pool.close()))
        _POOLS[ranks, backend] = RankPool(ranks, backend)
    return outcome


def close_all() -> list[str]:
    """End every worker of this process; returns what they had left running."""
    left = []
    while _POOLS:
        left += _POOLS.popitem()[1].close()
    return left


atexit.register(close_all)
