"""Judging processes and the budget each case has: a crash, an exit, a hang or a flood of memory ends as a verdict."""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError
from moe_harness.harness.core.findings import Answer, Explanation, Loaded, NotLoaded
from moe_harness.harness.core.plan import EXAMPLES, NEEDS_CUDA, ON_CUDA_ONLY, Planned, Request, plan
from moe_harness.harness.process.deaths import Deaths
from moe_harness.harness.process.start import START_BUDGET, Worker, make_folder, remove_folder

POLL = 0.1  # seconds between looks at the clock and at the memory of the workers
HANGS = "it hangs"
HINT = "no case needs that much; NotImplementedError refuses what an implementation cannot hold"
ENOUGH = 4 << 30  # bytes; the largest case holds 0.5 GiB, and one of a released model up to 2.5
EXPLAINED = 3  # failures of a run whose cause is searched for
INTERPRETED_STEPS = 600  # a step of a Triton kernel takes some 10 ms in the interpreter
INTERPRETED_PATIENCE = 5  # ... and a case that many times longer than a kernel that is compiled may
EXPLAIN_SECONDS = 5.0  # for each
COMPILE_BUDGET = 600.0  # seconds that compilers of one case may take beyond its own budget
COMPILE_LOOK = 5.0  # seconds between looks at whether they are still at work
DEATHS = 3  # crashes and hangs after which the kill matrix judges a fault no further; a run goes by `Deaths`


class Backend:
    """Where a run judges its cases: in processes of one device (`Pool`), or over ranks (`ranks.backend.OverRanks`).

    Use as a context manager; `start` comes first.
    """

    checks: tuple[str, ...] = ()  # those whose cases are the core of what is judged; none: the same as everywhere
    worlds: tuple[int, ...] = ()  # numbers of ranks; none on one device
    examples: Mapping[str, int] = EXAMPLES  # cases that the search draws, by profile
    search_seconds: Mapping[str, float] = {}  # and its time
    deaths = 0  # processes that ended over a case

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self) -> Loaded:
        """What the implementation says of itself; UsageError, CannotJudge where it cannot be loaded."""
        raise NotImplementedError

    def plan(self, request: Request) -> Iterable[Planned]:
        """What is to be judged."""
        raise NotImplementedError

    def cannot_run(self, planned: Planned) -> str | None:
        """Why a case cannot be judged here; None where it can."""
        return None

    def judge(self, case_ids: Iterable[str]) -> Iterator[Answer]:
        """Answers as they come, those of all cases or as many as are worth it (`spent`)."""
        raise NotImplementedError

    def spent(self) -> str | None:
        """Why nothing more is worth judging; None where it is."""
        return None

    def drawn(self, dtypes: tuple[str, ...]) -> Any:
        """The strategy that the search draws cases from."""
        raise NotImplementedError

    def ask_drawn(self, case: Case) -> Answer:
        """The answer on a drawn case."""
        raise NotImplementedError

    def judge_alone(self, case_ids: list[str]) -> Answer | None:
        """The answer on the last of these, judged in this order in a fresh process; None where every failure was."""
        return None

    def history_of(self, case_id: str) -> list[str]:
        """The cases judged before `case_id` in the same process."""
        return []

    def explain(self, case_id: str) -> Explanation | None:
        """Why a case fails, while nothing is judged; None where it dies or takes too long over it."""
        return None

    def explain_alone(self, case_id: str) -> Explanation | None:
        """As `explain`, while others are judged."""
        return self.explain(case_id)

    def describe(self) -> str | None:
        """How a right implementation computes, as the stage's probes tell; None where there is not the time."""
        return None

    def left_running(self) -> list[str]:
        """Processes that the implementation left behind, each told once."""
        return []


class Pool(Backend):
    """Workers for one implementation on one device."""

    search_seconds = {"quick": 15.0, "full": 120.0, "exhaustive": 900.0}

    def __init__(self, stage: str, spec: str, device: str, workers: int, budget: float):
        self.stage, self.device = stage, device
        self.folder: str = make_folder()
        self._make = lambda: Worker(stage, spec, device, self.folder)
        self.size, self.budget = workers, budget
        self.workers: list[Worker] = []
        self.deaths = self.explained = 0
        self.causes = Deaths()
        self.memory_limit = _memory_limit(workers) if device == "cpu" else None

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()
        remove_folder(self.folder)

    def start(self) -> Loaded:
        """Start every worker; returns what the first one says of the implementation.

        Raises:
            UsageError, CannotJudge: as `harness.core.contracts.load`; also when the process dies while importing it.
        """
        self.workers = [self._make() for _ in range(self.size)]
        for worker in self.workers:
            self._await_loaded(worker)
        loaded = self.workers[0].loaded
        self.budget *= INTERPRETED_PATIENCE if loaded.interpreted else 1
        return loaded

    def plan(self, request: Request) -> list[Planned]:
        return plan(self.stage, request)

    def cannot_run(self, planned: Planned) -> str | None:
        if planned.check in ON_CUDA_ONLY and self.device != "cuda":
            return NEEDS_CUDA
        if self.workers[0].loaded.interpreted and planned.case.steps() > INTERPRETED_STEPS:
            return f"more than {INTERPRETED_STEPS} tiles take too long in Triton's interpreter"
        return None

    def judge(self, case_ids: Iterable[str]) -> Iterator[Answer]:
        """Answers as they come, in no fixed order.  What is like cases that died is answered "skipped".

        Cases that fill a GPU's memory come last, one at a time.
        """
        ids = list(case_ids)
        large = [case_id for case_id in ids if case_id.split("/")[1] == "large_offsets"]
        for together in ([case_id for case_id in ids if case_id not in large], *([case_id] for case_id in large)):
            yield from self._judge(together)

    def _judge(self, case_ids: list[str]) -> Iterator[Answer]:
        waiting, put_off = deque(case_ids), list[str]()
        busy: list[Worker] = []
        while waiting or busy:
            idle = [w for w in self.workers if w not in busy]
            while idle and waiting:
                case_id = waiting.popleft()
                if self.causes.why_not(case_id):
                    put_off.append(case_id)
                    continue
                worker = idle.pop()
                worker.give(case_id, self._budget_now())
                busy.append(worker)
            if busy:
                wait([w.connection for w in busy], POLL)
            for worker in list(busy):
                answer = self._answer(worker)
                if answer is not None:
                    busy.remove(worker)
                    self._note(answer)
                    yield answer
            if not waiting and not busy:  # what is to blame may have changed since they were put off
                waiting.extend(case_id for case_id in put_off if not self.causes.why_not(case_id))
                put_off = [case_id for case_id in put_off if case_id not in waiting]
        for case_id in put_off:
            yield Answer(case_id, "skipped", self.causes.why_not(case_id) or "")

    def _note(self, answer: Answer) -> None:
        died = answer.status == "died" or answer.device_lost
        self.causes.note(answer.id, died=died, hung=died and HANGS in (answer.reason or ""))

    def judge_one(self, case_id: str) -> Answer:
        return next(iter(self.judge([case_id])))

    def drawn(self, dtypes: tuple[str, ...]) -> Any:
        from moe_harness.harness.run.property_search import cases

        return cases(self.stage, dtypes)

    def ask_drawn(self, case: Case) -> Answer:
        return self.judge_one(Planned("property", case).id)

    def judge_alone(self, case_ids: list[str]) -> Answer:
        """The answer for the last of `case_ids`, judged in this order in a fresh process."""
        worker = self._make()
        try:
            self._await_loaded(worker)
            for case_id in case_ids:
                worker.give(case_id, self._budget_now())
                answer: Answer | None = None
                while answer is None:
                    wait([worker.connection], POLL)
                    answer = self._answer(worker, replace=False)
                if answer.status == "died":
                    break
            assert answer is not None
            return answer
        finally:
            worker.stop()

    def forgive(self) -> None:
        """Judge what is like cases that died again: a run spares them, a proof wants to see them die."""
        self.causes = Deaths()

    def ask(self, budget: float, *message: Any) -> Any:
        """The answer of an idle worker to another task than judging; None where it dies or takes too long over it."""
        worker = self.workers[0]
        worker.connection.send(message)
        with suppress(EOFError, OSError):
            if _speaks(worker, budget):
                return worker.connection.recv()
        worker.stop()
        self.workers[0] = fresh = self._make()
        self._await_loaded(fresh)
        return None

    def describe(self) -> str | None:
        return self.ask(2 * self.search_seconds["quick"], "describe")

    def explain(self, case_id: str) -> Explanation | None:
        """Why a case fails, from an idle worker; None where it dies or takes too long over it."""
        self.explained += 1
        return self.ask(4 * EXPLAIN_SECONDS, "explain", case_id, EXPLAIN_SECONDS)

    def explain_alone(self, case_id: str) -> Explanation | None:
        """As `explain`, from a process of its own: the workers may be busy."""
        worker = self._make()
        try:
            self._await_loaded(worker)
            worker.connection.send(("explain", case_id, EXPLAIN_SECONDS))
            return worker.connection.recv() if _speaks(worker, 4 * EXPLAIN_SECONDS) else None
        except (EOFError, OSError, HarnessError):  # the failure stands without a cause
            return None
        finally:
            worker.stop()

    def history_of(self, case_id: str) -> list[str]:
        """The cases judged before `case_id` in the same process."""
        for worker in self.workers:
            if case_id in worker.history:
                return worker.history[: worker.history.index(case_id)]
        return []

    def _budget_now(self) -> float:
        return self.budget if self.deaths == 0 else max(5.0, self.budget / 4)

    def _answer(self, worker: Worker, replace: bool = True) -> Answer | None:
        """What a busy worker has to say by now; its death is an answer too."""
        try:
            if worker.connection.poll():
                answer: Answer = worker.connection.recv()
                if replace and answer.device_lost:
                    self._replace(worker)
                return answer
        except (EOFError, OSError):
            return self._bury(worker, f"the process was {worker.ended()}", replace)
        if worker.is_late():
            worker.tell_where()
            if self._may_compile(worker):
                return None
            told = f"no answer within its budget of {self._budget_now():.0f} s: {HANGS}"
            if worker.compiling_since is not None:
                told = f"it was still being compiled after {COMPILE_BUDGET:.0f} s"
            return self._bury(worker, told, replace)
        if self.memory_limit is not None and worker.memory() > self.memory_limit:
            gib = self.memory_limit / 2**30
            return self._bury(worker, f"its process grew beyond {gib:.1f} GiB ({HINT})", replace)
        return None

    def _may_compile(self, worker: Worker) -> bool:
        """Give a case that is being compiled another look later, and its own budget once that is over."""
        now = time.monotonic()
        if not worker.is_compiling():
            over, worker.compiling_since = worker.compiling_since is not None, None
            worker.allow(self._budget_now())
            return over
        if worker.compiling_since is None:
            worker.compiling_since = now
        worker.deadline = now + COMPILE_LOOK
        return now - worker.compiling_since < COMPILE_BUDGET

    def _bury(self, worker: Worker, cause: str, replace: bool) -> Answer:
        worker.stop()
        words = worker.last_words()
        if replace:
            self._replace(worker)
        return Answer(str(worker.current), "died", cause + (f"; it last printed: {words}" if words else ""))

    def _replace(self, worker: Worker) -> None:
        """A fresh process in the place of one that died, or whose device is lost."""
        worker.stop()
        self.deaths += 1
        self.workers[self.workers.index(worker)] = fresh = self._make()
        fresh.history = list(worker.history)
        self._await_loaded(fresh)

    def _await_loaded(self, worker: Worker) -> None:
        try:
            if not worker.connection.poll(max(0.0, worker.deadline - time.monotonic())):
                raise CannotJudge(f"the implementation was not imported within {START_BUDGET:.0f} s")
            told = worker.connection.recv()
        except EOFError:
            words = worker.last_words()
            raise CannotJudge(f"the process was {worker.ended()} while it imported the implementation"
                              + (f"; it last printed: {words}" if words else "")) from None  # fmt: skip
        if isinstance(told, NotLoaded):
            kind = UsageError if told.exit_status == UsageError.exit_status else CannotJudge
            error = kind(told.error)
            error.add_note(told.traceback)
            raise error
        worker.loaded = told


def _speaks(worker: Worker, budget: float) -> bool:
    """Whether there is an answer within so many seconds of the worker's own; OSError where it died."""
    worker.allow(budget)
    while not worker.connection.poll(POLL):
        if worker.is_late():
            return False
    return True


def _memory_limit(workers: int) -> int:
    """Bytes one worker may hold: its share of four fifths of the memory available now, at most ENOUGH."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30
    return max(2 << 30, min(ENOUGH, int(0.8 * available / workers)))


def worker_count(device: str) -> int:
    """Processes that judge at a time: one per core, on a GPU one per two: most of its cases compile a kernel."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(8, cores // 2 if device == "cuda" else cores))
