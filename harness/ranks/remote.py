"""Workers on other machines: torchrun starts one server per rank, each holds one worker and passes on what it says.

    MOE_HARNESS_RANKS_KEY=secret torchrun --nnodes 2 --nproc-per-node 4 ... -m moe_harness.harness.ranks.serve HOST:PORT
    MOE_HARNESS_RANKS_KEY=secret MOE_HARNESS_RANKS=HOST:PORT pytest suites/dispatcher

pytest stays one controller; it listens at HOST:PORT and the servers come to it.  A worker that failed is killed and
replaced by its server, so that one failure never reaches the next case.
"""

import atexit
import contextlib
import os
import time
from multiprocessing import connection
from typing import Any

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.heartbeat import RankStatus, State
from moe_harness.harness.ranks.jobs import Exit, Home

ADDRESS, KEY = "MOE_HARNESS_RANKS", "MOE_HARNESS_RANKS_KEY"
ANSWER = 20.0  # seconds a server may take to answer


def parse_address(text: str) -> tuple[str, int]:
    """ "host:port" as the pair that sockets take.

    Raises:
        CannotJudge: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise CannotJudge(f"{ADDRESS} is {text!r}, but should look like 10.0.0.1:29777")
    return host, int(port)


def key() -> bytes:
    """The secret that controller and servers share; what they exchange is pickled, so nobody else may connect.

    Raises:
        CannotJudge: it is not set.
    """
    if not os.environ.get(KEY):
        raise CannotJudge(f"{KEY} has to hold the same secret for the controller and the servers")
    return os.environ[KEY].encode()


class Servers:
    """The servers that have come, by rank."""

    def __init__(self, address: str):
        self.listener = connection.Listener(parse_address(address), authkey=key())
        self.ends: dict[int, Any] = {}
        atexit.register(self.listener.close)

    def wait_for(self, ranks: int, seconds: float) -> list[Any]:
        """Connections to the servers of ranks 0..ranks-1.

        Raises:
            CannotJudge: they did not come in time.
        """
        deadline = time.monotonic() + seconds
        socket = self.listener._listener._socket  # type: ignore[attr-defined]
        while any(rank not in self.ends for rank in range(ranks)):
            socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                end = self.listener.accept()
            except (TimeoutError, OSError) as error:
                if time.monotonic() < deadline:
                    continue
                raise CannotJudge(f"{ranks} ranks are needed, {len(self.ends)} servers have come") from error
            self.ends[end.recv()] = end
        return [self.ends[rank] for rank in range(ranks)]


_SERVERS: list[Servers] = []


def servers() -> Servers:
    """The one listener of this process, opened at the first use."""
    if not _SERVERS:
        _SERVERS.append(Servers(os.environ[ADDRESS]))
    return _SERVERS[0]


class RemoteMember:
    """A worker behind a server; satisfies `harness.ranks.rank_process.RankProcess`."""

    def __init__(self, rank: int, end: Any, home: Home):
        self.rank, self.end = rank, end
        self.last, self.slept, self.stopped, self.log = RankStatus(0, State.IDLE), None, False, ""
        self.buffered: list[Any] = []  # came while an answer was awaited
        self.send_server("start", home)

    def send_server(self, kind: str, content: Any = None) -> None:
        self.end.send((kind, content))

    def send(self, message: Any) -> None:
        self.send_server("job", message)

    def receive(self) -> Any:
        """A message of the worker, or None where the server only told its heartbeat."""
        try:
            kind, content = self.buffered.pop(0) if self.buffered else self.end.recv()
        except (EOFError, OSError):
            return Exit(-9)
        if kind == "beat":
            self.last, self.slept, self.stopped = content
            return None
        if kind == "exit":
            code, self.log = content
            return Exit(code)
        return content if kind == "reply" else None

    def _ask(self, kind: str) -> Any:
        """Send a request and return its answer, taking in what comes before."""
        self.send_server(kind)
        deadline = time.monotonic() + ANSWER
        while self.end.poll(max(0.0, deadline - time.monotonic())):
            got, content = self.end.recv()
            if got == kind:
                return content
            if got == "beat":
                self.last, self.slept, self.stopped = content
            else:
                self.buffered.append((got, content))
        raise CannotJudge(f"the server of rank {self.rank} does not answer")

    def beat(self) -> RankStatus:
        return self.last

    def refresh(self) -> None:
        """Have the server tell what the worker says now: what was told before may be late."""
        self.last, self.slept, self.stopped = self._ask("fresh")

    def ticks(self) -> int | None:
        return self.slept

    def share(self) -> None:
        """Not told: it changes at every look, and what changes is not worth a message."""

    def is_stopped(self) -> bool:
        return self.stopped

    def said(self) -> str:
        return self.log

    def calls(self) -> list[RecordedCall]:
        return self._ask("calls")

    def close(self) -> list[str]:
        """Have the worker killed; the server stays for the next one."""
        with contextlib.suppress(OSError, EOFError):
            return self._ask("stop")
        return []


def start(ranks: int, backend: str, seconds: float) -> list[RemoteMember]:
    """One worker behind each of the first `ranks` servers, meeting at a store that rank 0 opens."""
    ends = servers().wait_for(ranks, seconds)
    ends[0].send(("address", None))
    while (answer := ends[0].recv())[0] != "address":
        pass
    home = Home("", ranks, backend, answer[1])
    return [RemoteMember(rank, end, home) for rank, end in enumerate(ends)]
