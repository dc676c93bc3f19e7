"""One worker as the controller sees it: a process of this machine, or one that a server holds on some other."""

import contextlib
import json
import os
import signal
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moe_harness.harness.process.parent_watch import end_with
from moe_harness.harness.process.start import fork_server, start
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.heartbeat import Heartbeat, RankStatus
from moe_harness.harness.ranks.jobs import Exit, Home


class Share(NamedTuple):
    """What the thread that runs a worker's tasks had of the processors of its machine, in seconds since it began."""

    ran: float
    waited: float  # ready to run, while others had them


class RankProcess(Protocol):
    """What the pool needs of a worker."""

    end: Any  # waitable: ready when there is something to receive
    buffered: list[Any]  # received already, not yet taken

    def send(self, message: Any) -> None: ...

    def receive(self) -> Any:
        """The next message, an Exit where the worker is gone, or None where there is nothing for the pool."""

    def beat(self) -> RankStatus: ...

    def refresh(self) -> None:
        """Make `beat` tell the present."""

    def ticks(self) -> int | None:
        """Processor time of a worker that sleeps; None of one that could run or whose children could."""

    def share(self) -> Share | None:
        """Of the processors; None where that is not known."""

    def is_stopped(self) -> bool:
        """Whether the process is stopped by a signal, and so can do nothing until another one."""

    def said(self) -> str: ...

    def calls(self) -> list[RecordedCall]: ...

    def close(self) -> list[str]:
        """End the worker with all processes that it has started; returns what those were called."""


class LocalMember:
    """A worker forked on this machine, with its heartbeat, log and journal in files."""

    def __init__(self, rank: int, home: Home, heartbeat: Heartbeat):
        self.rank, self.home, self.heartbeat = rank, home, heartbeat
        self.buffered: list[Any] = []
        context = fork_server()
        self.end, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, rank, home), daemon=True)
        start(self.process)
        theirs.close()

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end is noticed where the answer is awaited
            self.end.send(message)

    def receive(self) -> Any:
        try:
            return self.end.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            code = self.process.exitcode
            return Exit(-signal.SIGKILL if code is None else code)

    def beat(self) -> RankStatus:
        return self.heartbeat.read(self.rank)

    def refresh(self) -> None:
        """Nothing to do: the memory is shared."""

    def ticks(self) -> int | None:
        process, total = Path(f"/proc/{self.process.pid}"), 0
        try:
            for thread in (process / "task").iterdir():
                state, *fields = (thread / "stat").read_text().rpartition(")")[2].split()
                if state != "S":  # it runs, waits for its turn on a busy machine, or for a disk
                    return None
                if (thread / "children").read_text().strip():  # it may be waiting for a compiler that it started
                    return None
                total += int(fields[10]) + int(fields[11])
        except OSError:
            return None
        return total

    def share(self) -> Share | None:
        try:
            ran, waited, _ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        except (OSError, ValueError):
            return None
        return Share(int(ran) / 1e9, int(waited) / 1e9)

    def is_stopped(self) -> bool:
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def said(self) -> str:
        path = self.home.log(self.rank)
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""

    def calls(self) -> list[RecordedCall]:
        """What it wrote down; a line cut off by its end is left out."""
        path = self.home.journal(self.rank)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [RecordedCall.from_dict(json.loads(line)) for line in lines]

    def close(self) -> list[str]:
        """It may be stuck, so it is not asked."""
        left = _of_group(self.process.pid)
        if left or self.process.is_alive():
            for end in (os.killpg, os.kill):  # a worker that has only just begun has no group of its own
                with contextlib.suppress(OSError):
                    end(self.process.pid, signal.SIGKILL)
        self.end.close()
        self.process.join()
        return left


def _of_group(leader: int) -> list[str]:
    """Command lines of the processes in the group of `leader`, without itself."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            group = (folder / "stat").read_text().rpartition(")")[2].split()[2]
            if int(group) == leader and int(folder.name) != leader:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found.append(b" ".join(words).decode(errors="replace").strip()[:80] or "a process that has ended")
    return sorted(found)


def wait(members: list[RankProcess], seconds: float) -> list[RankProcess]:
    """Those that have something to receive."""
    if buffered := [member for member in members if member.buffered]:
        return buffered
    ready = connection.wait([member.end for member in members], seconds)
    return [member for member in members if member.end in ready]


def _serve(end: Any, rank: int, home: Home) -> None:
    from moe_harness.harness.ranks.worker import serve  # imports torch, which the controller does without

    os.setsid()  # what it starts ends with it, and Ctrl-C is for the controller
    end_with(end)
    serve(end, rank, home)
