"""The controller: a pool of workers per (world size, backend), one job at a time, a clean pool after every failure.

    outcome = pool.run("package.module:task", {"any": "plain spec"}, ranks=2, seed=0)
    outcome.results      what the task returned on each rank
    outcome.failure      one headline and the secondary errors, where a rank did not come to its end

The controller imports no torch.  A deadlock is proved after 150 ms without progress; see `harness.ranks.proof`.
"""

import atexit
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import Any

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.ranks import remote
from moe_harness.harness.ranks.calls import Call
from moe_harness.harness.ranks.failure import Evidence, Failure, classify
from moe_harness.harness.ranks.heartbeat import Beat, State
from moe_harness.harness.ranks.jobs import Exit, Home, Injection, Job
from moe_harness.harness.ranks.members import LocalMember, Member, wait
from moe_harness.harness.ranks.proof import of_job, stalemate

PATIENCE = 0.15  # seconds without progress before a proof is looked for
STALL = 0.5  # seconds in which no thread of a rank outside collectives wanted a processor before it counts as hung
BUDGET = 60.0  # seconds a case may take in all
START = 60.0  # seconds a pool may take to start, the first import of torch included
POLL = 0.02


@dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    results: list[Any] = field(default_factory=list)
    traces: list[list[Call]] = field(default_factory=list)
    failure: Failure | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.failure is None


class Pool:
    """The workers of one world."""

    def __init__(self, world_size: int, backend: str):
        self.world_size, self.backend, self.ready = world_size, backend, False
        self.jobs = 0
        self.folder, self.heartbeat = "", None
        if os.environ.get(remote.ADDRESS):
            self.members: list[Member] = list(remote.start(world_size, backend, START))
            return
        self.folder = tempfile.mkdtemp(prefix="moe-harness-ranks-")
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

    def run(self, job: Job, budget: float = BUDGET) -> Outcome:
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
        return Outcome(
            [None if reply is None else reply.result for reply in replies],
            [evidence.calls(rank) for rank in ranks],
            classify(evidence),
            evidence.seconds,
        )

    def close(self) -> None:
        """End the workers at once; they may be stuck, so nobody is asked."""
        for member in self.members:
            member.close()
        if self.heartbeat is not None:
            self.heartbeat.close()
            shutil.rmtree(self.folder, ignore_errors=True)


class _Watch:
    """Waits for the replies to one job and stops as soon as it is proved that some will never come."""

    def __init__(self, members: list[Member], number: int, budget: float):
        self.members, self.number, self.evidence = members, number, Evidence()
        self.deadline = time.monotonic() + budget
        self.open = dict(enumerate(members))
        self.sequences: list[int] = []
        self.moved = time.monotonic()  # when a sequence number last changed
        self.used: dict[int, tuple[int, float]] = {}  # rank -> processor ticks and when they last grew

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

    def _beats(self) -> list[Beat]:
        return of_job([member.beat() for member in self.members], self.number)

    def _over(self) -> bool:
        now, beats = time.monotonic(), self._beats()
        sequences = [beat.sequence for beat in beats]
        if sequences != self.sequences:
            self.sequences, self.moved = sequences, now
        if now > self.deadline:
            return True
        if now - self.moved < PATIENCE:
            return False
        proof = stalemate(beats, frozenset(self.evidence.exits), lambda rank: self.members[rank].calls())
        if proof is not None and self._still(sequences):
            self.evidence.stalemate = proof
            return True
        running = [rank for rank in self.open if beats[rank].state == State.RUNNING]
        idle = tuple(rank for rank in running if self._idle_for(rank, now) > STALL)
        self.evidence.stalled = idle
        return bool(idle) and idle == tuple(running)

    def _still(self, sequences: list[int]) -> bool:
        """Whether nothing has moved by now either: what remote ranks said may have come late."""
        for member in self.open.values():
            member.refresh()
        return [member.beat().sequence for member in self.members] == sequences and not any(
            member.buffered for member in self.open.values()
        )

    def _idle_for(self, rank: int, now: float) -> float:
        """Seconds for which the rank's process was asleep, with all its threads, at every look."""
        ticks = self.members[rank].ticks()
        if ticks is None:
            self.used.pop(rank, None)
        elif rank not in self.used or self.used[rank][0] != ticks:
            self.used[rank] = (ticks, now)
        return now - max(self.used[rank][1], self.moved) if rank in self.used else 0.0


_POOLS: dict[tuple[int, str], Pool] = {}


def run(
    task: str,
    spec: Any,
    *,
    ranks: int,
    seed: int = 0,
    backend: str = "gloo",
    injection: Injection | None = None,
    budget: float = BUDGET,
) -> Outcome:
    """Run `task` ("package.module:function", called with (Rank, spec, seed)) on every rank of a pool.

    A failed pool is replaced at once; the new workers start while the caller looks at the outcome.
    """
    if os.environ.get(remote.ADDRESS):  # a server holds one worker, so pools of other sizes have to go first
        for other in [known for known in _POOLS if known != (ranks, backend)]:
            _POOLS.pop(other).close()
    pool = _POOLS.get((ranks, backend)) or _POOLS.setdefault((ranks, backend), Pool(ranks, backend))
    try:
        outcome = pool.run(Job(task, spec, seed, injection), budget)
    except BaseException:
        _POOLS.pop((ranks, backend)).close()
        raise
    if not outcome.ok:
        pool.close()
        _POOLS[ranks, backend] = Pool(ranks, backend)
    return outcome


def close_all() -> None:
    """End every worker of this process."""
    while _POOLS:
        _POOLS.popitem()[1].close()


atexit.register(close_all)
