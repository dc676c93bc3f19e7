"""The server that forks every process of the harness, how one is started, and a judging one as seen from outside.

No process runs the caller's script.  The temporary folders of a run are made here too: one whose owner was killed is
removed when the next is made.  The owner holds a lock on a file in it for as long as it lives; the system lets go of
it, however the owner ends.
"""

import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_harness.harness.core.findings import Loaded
from moe_harness.harness.core.own_time import waited_for_processor

START_BUDGET = 180.0  # seconds for importing an implementation
# Files of Triton's and Inductor's compilers and of torch's C++ extensions, as they stand in a stack.
COMPILERS = re.compile(r"triton/(compiler/|backends/\w+/compiler)|torch/(_inductor/|_dynamo/|utils/cpp_extension)")
_ONE_AT_A_TIME = threading.Lock()  # the kill matrix starts processes from several threads
# A program has one such server, whoever asks first: it imports what any process needs, 2 s that each would take alone.
PRELOADED = ["moe_harness.harness.process.worker", "moe_harness.harness.ranks.worker", "scipy.special",
             "moe_harness.harness.process.frozen"]  # fmt: skip


def fork_server() -> Any:
    """multiprocessing's context, its server started; called early, it imports torch while the caller plans."""
    context = multiprocessing.get_context("forkserver")
    root = str(Path(__file__).parents[3])
    with _ONE_AT_A_TIME, _environment(PYTHONPATH=os.pathsep.join([root, *filter(None, sys.path)]), OMP_NUM_THREADS="1"):
        context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    return context


def start(process: BaseProcess) -> None:
    """Start a process of the server."""
    with _ONE_AT_A_TIME, _without_main():
        process.start()


@contextmanager
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


@contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing imports the caller's main module in each process: a script that may have no guard, or pytest."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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

    def ended(self) -> str:
        """As `cause_of_death`, to follow "the process was"."""
        cause = self.cause_of_death()
        return cause if cause.startswith("killed") else f"gone: it {cause}"


def _serve(environment: dict[str, str], *arguments: Any) -> None:
    """`harness.process.worker.serve`, imported where it runs: this process needs no torch."""
    os.environ.clear()
    os.environ.update(environment)
    from moe_harness.harness.process.worker import serve

    serve(*arguments)


PREFIX, NEW = "moe-harness-run-", "moe-harness-new-"
LOCK = "owner.lock"


def make_folder() -> str:
    """A new folder for this process alone; removes those whose owners are gone."""
    _sweep(Path(tempfile.gettempdir()))
    fresh = Path(tempfile.mkdtemp(prefix=NEW))
    held = _locked(fresh)
    folder = str(fresh.rename(fresh.with_name(PREFIX + fresh.name.removeprefix(NEW))))  # swept only from now on
    _HELD[folder] = held
    return folder


def remove_folder(folder: str) -> None:
    """Remove a folder that `make_folder` made."""
    held = _HELD.pop(folder, None)
    shutil.rmtree(folder, ignore_errors=True)
    if held is not None:
        os.close(held)


_HELD: dict[str, int | None] = {}  # folder -> descriptor of its lock


def _locked(folder: Path) -> int | None:
    """The descriptor of the lock on `folder`, or None where somebody holds it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove what `make_folder` made and nobody holds; a folder without our file is somebody's own."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid() or not (folder / LOCK).is_file():
                continue
            held = _locked(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
