"""Judging processes and the budget each case has: a crash, an exit, a hang or a flood of memory ends as a verdict."""

import os
import re
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import CannotJudge, HarnessError, UsageError
from moe_harness.harness.core.findings import Answer, Explanation, Loaded, NotLoaded
from moe_harness.harness.process import scratch
from moe_harness.harness.process.deaths import Deaths
from moe_harness.harness.process.start import fork_server, start

POLL = 0.1  # seconds between looks at the clock and at the memory of the workers
HANGS = "it hangs"
START_BUDGET = 180.0  # seconds for importing an implementation
HINT = "no case needs that much; NotImplementedError refuses what an implementation cannot hold"
ENOUGH = 4 << 30  # bytes; the largest case holds 0.5 GiB, and one of a released model up to 2.5
EXPLAINED = 3  # failures of a run whose cause is searched for
EXPLAIN_SECONDS = 5.0  # for each
COMPILE_BUDGET = 600.0  # seconds that compilers of one case may take beyond its own budget
COMPILE_LOOK = 5.0  # seconds between looks at whether they are still at work
# Files of Triton's and Inductor's compilers and of torch's C++ extensions, as they stand in a stack.
COMPILERS = re.compile(r"triton/(compiler/|backends/\w+/compiler)|torch/(_inductor/|_dynamo/|utils/cpp_extension)")
DEATHS = 3  # crashes and hangs after which the kill matrix judges a fault no further; a run goes by `Deaths`


def waited_for_processor(pid: int | None) -> float:
    """Seconds that the main thread of a process was ready to run while others did; 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


class Worker:
    """One judging process."""

    def __init__(self, stage: str, spec: str, device: str, folder: str):
        context = fork_server()
        self.connection, theirs = context.Pipe()
        descriptor, self.output = tempfile.mkstemp(dir=folder, suffix=".log")
        os.close(descriptor)
        # The server that forks may be older than a change of the environment: a notebook sets TRITON_INTERPRET late.
        told = (dict(os.environ), theirs, self.output, stage, spec, device)
        self.process = context.Process(target=_serve, args=told, daemon=True)
        start(self.process)
        theirs.close()
        self.loaded = Loaded()
        self.current: str | None = None
        self.history: list[str] = []
        self.compiling_since: float | None = None
        self.allow(START_BUDGET)

    def give(self, case_id: str, budget: float) -> None:
        self.current = case_id
        self.history.append(case_id)
        self.allow(budget)
        self.connection.send(("judge", case_id))

    def allow(self, seconds: float) -> None:
        """From now on the process has so many seconds, those not counted in which it waits for a processor."""
        self.deadline, self.waited = time.monotonic() + seconds, waited_for_processor(self.process.pid)

    def is_late(self) -> bool:
        """Whether its time is over."""
        if time.monotonic() <= self.deadline:
            return False
        before, self.waited = self.waited, waited_for_processor(self.process.pid)
        self.deadline += self.waited - before
        return time.monotonic() > self.deadline

    def memory(self) -> int:
        """Resident bytes."""
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096
        except (OSError, IndexError, ValueError):
            return 0

    def stop(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)

    def tell_where(self) -> None:
        """Let a process that hangs print where it is, before it is killed."""
        pid = self.process.pid
        if pid is None:
            return
        with suppress(OSError):
            os.kill(pid, signal.SIGUSR1)  # faulthandler listens, in C
            time.sleep(0.3)

    def is_compiling(self) -> bool:
        """Whether the place it told last lies in a compiler of kernels."""
        told = Path(self.output).read_text(errors="replace").rpartition("(most recent call first):")[2]
        return COMPILERS.search(told) is not None

    def last_words(self) -> str:
        """The end of what the process printed, or the innermost calls where a fatal signal left a traceback."""
        lines = Path(self.output).read_text(errors="replace").strip().splitlines()
        fatal = [place for place, line in enumerate(lines) if line.endswith("(most recent call first):")]
        told = lines[fatal[-1] + 1 :][:4] if fatal else lines[-4:]
        told = [line for line in told if "/harness/" not in line and "Extension modules" not in line]
        return " | ".join(line.strip() for line in told)[:400]

    def cause_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"left with exit status {code}"


class Pool:
    """Workers for one implementation.  Use as a context manager."""

    def __init__(self, stage: str, spec: str, device: str, workers: int, budget: float):
        self.folder: str = scratch.make()
        self._make = lambda: Worker(stage, spec, device, self.folder)
        self.size, self.budget = workers, budget
        self.workers: list[Worker] = []
        self.deaths = self.explained = 0
        self.causes = Deaths()
        self.memory_limit = _memory_limit(workers) if device == "cpu" else None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()
        scratch.remove(self.folder)

    def start(self) -> Loaded:
        """Start every worker; returns what the first one says of the implementation.

        Raises:
            UsageError, CannotJudge: as `harness.core.contracts.load`; also when the process dies while importing it.
        """
        self.workers = [self._make() for _ in range(self.size)]
        for worker in self.workers:
            self._await_loaded(worker)
        return self.workers[0].loaded

    def judge(self, case_ids: Iterable[str]) -> Iterator[Answer]:
        """Answers as they come, in no fixed order.  What is like cases that died is answered "skipped"."""
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
        try:
            if worker.connection.poll(budget):
                return worker.connection.recv()
        except (EOFError, OSError):
            pass
        worker.stop()
        self.workers[0] = fresh = self._make()
        self._await_loaded(fresh)
        return None

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
            return worker.connection.recv() if worker.connection.poll(4 * EXPLAIN_SECONDS) else None
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
            return self._bury(worker, f"the process was {_ended(worker)}", replace)
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
            raise CannotJudge(f"the process was {_ended(worker)} while it imported the implementation"
                              + (f"; it last printed: {words}" if words else "")) from None  # fmt: skip
        if isinstance(told, NotLoaded):
            kind = UsageError if told.exit_status == UsageError.exit_status else CannotJudge
            error = kind(told.error)
            error.add_note(told.traceback)
            raise error
        worker.loaded = told


def _serve(environment: dict[str, str], *arguments: Any) -> None:
    """`harness.process.worker.serve`, imported where it runs: this process needs no torch."""
    os.environ.clear()
    os.environ.update(environment)
    from moe_harness.harness.process.worker import serve

    serve(*arguments)


def _ended(worker: Worker) -> str:
    cause = worker.cause_of_death()
    return cause if cause.startswith("killed") else f"gone: it {cause}"


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
