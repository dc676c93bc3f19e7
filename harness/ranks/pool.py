"""The controller: a pool of workers per (world size, backend), one job at a time, a clean pool after every failure.

    outcome = pool.run("package.module:task", {"any": "plain spec"}, ranks=2, seed=0)
    outcome.results      what the task returned on each rank
    outcome.failure      one headline and the secondary errors, where a rank did not come to its end

The controller imports no torch.  A deadlock is proved after 150 ms without progress; see `harness.ranks.proof`.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from harness.errors import CannotJudge
from harness.ranks.calls import Call
from harness.ranks.failure import Evidence, Failure, classify
from harness.ranks.heartbeat import State
from harness.ranks.jobs import Home, Injection, Job
from harness.ranks.proof import stalemate

PATIENCE = 0.15  # seconds without progress before a proof is looked for
STALL = 0.8  # seconds in which a rank outside collectives used no processor before it counts as hung
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
        self.folder = tempfile.mkdtemp(prefix="moe-harness-ranks-")
        self.home = Home(self.folder, world_size, backend)
        self.heartbeat = self.home.heartbeat(create=True)
        self.ready = False
        self.ends: list[Any] = []
        self.processes: list[Any] = []
        context = _context()
        with _without_main():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, self.home), daemon=True)
                process.start()
                theirs.close()
                self.ends.append(ours)
                self.processes.append(process)

    def wait_ready(self) -> None:
        """Return when every worker has joined the group.

        Raises:
            CannotJudge: a worker died or did not answer in time.
        """
        if self.ready:
            return
        deadline = time.monotonic() + START
        for rank, end in enumerate(self.ends):
            try:
                if end.poll(max(0.0, deadline - time.monotonic())) and end.recv() == "ready":
                    continue
            except (EOFError, OSError):
                pass
            raise CannotJudge(
                f"rank {rank} of {self.home.world_size} did not start on {self.home.backend}\n{self._said(rank)}"
            )
        self.ready = True

    def run(self, job: Job, budget: float = BUDGET) -> Outcome:
        """Run `job` on every rank.  A pool that yields a failure must not be used again."""
        self.wait_ready()
        start = time.monotonic()
        for end in self.ends:
            end.send(job)
        evidence = _Watch(self, budget).wait()
        evidence.seconds = time.monotonic() - start
        evidence.logs = {rank: self._said(rank) for rank in evidence.exits}
        evidence.journals = {rank: self._calls(rank) for rank in range(len(self.ends)) if rank not in evidence.replies}
        failure = classify(evidence)
        replies = [evidence.replies.get(rank) for rank in range(len(self.ends))]
        return Outcome(
            [None if reply is None else reply.result for reply in replies],
            [evidence.calls(rank) for rank in range(len(self.ends))],
            failure,
            evidence.seconds,
        )

    def _calls(self, rank: int) -> list[Call]:
        """What a rank that cannot reply wrote down; a line cut off by its end is left out."""
        path = self.home.journal(rank)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [Call.from_dict(json.loads(line)) for line in lines]

    def _said(self, rank: int) -> str:
        path = self.home.log(rank)
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""

    def close(self) -> None:
        """End the workers at once; they may be stuck, so nobody is asked."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process, end in zip(self.processes, self.ends, strict=True):
            end.close()
            process.join()
        self.heartbeat.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Watch:
    """Waits for the replies to one job and stops as soon as it is proved that some will never come."""

    def __init__(self, pool: Pool, budget: float):
        self.pool, self.evidence = pool, Evidence()
        self.deadline = time.monotonic() + budget
        self.open = dict(enumerate(pool.ends))
        self.sequences: list[int] = []
        self.moved = time.monotonic()  # when a sequence number last changed
        self.used: dict[int, tuple[int, float]] = {}  # rank -> processor ticks and when they last grew

    def wait(self) -> Evidence:
        while self.open and not self._over():
            for end in connection.wait(list(self.open.values()), POLL):
                self._receive(next(rank for rank, known in self.open.items() if known is end))
        self.evidence.beats = self.pool.heartbeat.read_all()
        return self.evidence

    def _receive(self, rank: int) -> None:
        end = self.open.pop(rank)
        try:
            self.evidence.replies[rank] = end.recv()
        except (EOFError, OSError):
            process = self.pool.processes[rank]
            process.join(1.0)
            self.evidence.exits[rank] = process.exitcode if process.exitcode is not None else -signal.SIGKILL
        self.moved = time.monotonic()

    def _over(self) -> bool:
        now, beats = time.monotonic(), self.pool.heartbeat.read_all()
        sequences = [beat.sequence for beat in beats]
        if sequences != self.sequences:
            self.sequences, self.moved = sequences, now
        if now > self.deadline:
            return True
        if now - self.moved < PATIENCE:
            return False
        proof = stalemate(beats, frozenset(self.evidence.exits))
        if proof is not None:
            self.evidence.stalemate = proof
            return True
        running = [rank for rank in self.open if beats[rank].state == State.RUNNING]
        idle = tuple(rank for rank in running if self._idle_for(rank, now) > STALL)
        self.evidence.stalled = idle
        return bool(idle) and idle == tuple(running)

    def _idle_for(self, rank: int, now: float) -> float:
        """Seconds for which the rank's process has slept without using any processor."""
        ticks = _processor_ticks(self.pool.processes[rank].pid)
        if ticks is None or rank not in self.used or self.used[rank][0] != ticks:
            self.used[rank] = (ticks or 0, now)
        return now - max(self.used[rank][1], self.moved)


def _processor_ticks(pid: int) -> int | None:
    """User and system time of a sleeping process; None where it is runnable or cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12]) if fields[0] == "S" else None


def _serve(end: Any, rank: int, home: Home) -> None:
    from harness.ranks.worker import serve  # imports torch, which the controller does without

    serve(end, rank, home)


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


def _context() -> Any:
    """The fork server, started once with torch already imported in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.ranks.preload"])
    root = str(Path(__file__).parents[2])
    with _environment(PYTHONPATH=os.pathsep.join([root, *filter(None, sys.path)]), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Workers have no use for the caller's main module, which would be imported again in each of them."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
