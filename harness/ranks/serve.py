"""The server of one rank, started by torchrun on each node: `python -m moe_harness.harness.ranks.serve HOST:PORT`.

It holds one worker process at a time for a controller elsewhere, passes jobs to it, and replies, heartbeats and its
end back.  The rank is torchrun's RANK, the place of rank 0's store MASTER_ADDR.
"""

import contextlib
import os
import socket
import sys
import time
from dataclasses import replace
from multiprocessing import connection
from typing import Any

from moe_harness.harness.process.start import make_folder, remove_folder
from moe_harness.harness.ranks.jobs import Exit, Home
from moe_harness.harness.ranks.rank_process import LocalMember
from moe_harness.harness.ranks.remote import key, parse_address

POLL = 0.02
RETRY = 0.2


class Relay:
    """Between one controller and one worker."""

    def __init__(self, rank: int, control: Any):
        self.rank, self.control = rank, control
        self.member: LocalMember | None = None
        self.told: Any = None  # what the controller knows
        self.seen: Any = None  # what the worker said at the last look

    def run(self) -> None:
        """Until the controller goes away."""
        while True:
            ends: list[Any] = [self.control, *([self.member.end] if self.member is not None else [])]
            for end in connection.wait(ends, POLL):
                commanded = end is self.control
                if commanded:
                    self._command(*self.control.recv())
                elif self.member is not None:
                    self._pass_on(self.member.receive())
            self._tell()

    def _command(self, kind: str, content: Any) -> None:
        if kind == "start":
            self.close()
            home: Home = replace(content, folder=make_folder())
            self.member = LocalMember(self.rank, home, home.heartbeat(create=True))
        elif kind == "job" and self.member is not None:
            self.member.send(content)
        elif kind == "fresh":
            self.control.send((kind, self._now()))
        elif kind == "calls":
            self.control.send((kind, self.member.calls() if self.member is not None else []))
        elif kind == "stop":
            self.control.send((kind, self.close()))
        elif kind == "address":
            self.control.send((kind, free_address()))

    def _pass_on(self, message: Any) -> None:
        assert self.member is not None
        self._tell(always=True)  # the heartbeat before the message that it belongs to
        if isinstance(message, Exit):
            self.control.send(("exit", (message.code, self.member.said())))
            self.member.end.close()
            self._forget_end()
        else:
            self.control.send(("reply", message))

    def _forget_end(self) -> None:
        """Keep the dead worker's files for questions, but nothing to wait on."""
        assert self.member is not None
        self.member.end = connection.Pipe()[0]

    def _now(self) -> Any:
        assert self.member is not None
        return self.member.beat(), self.member.ticks(), self.member.is_stopped()

    def _tell(self, *, always: bool = False) -> None:
        """Tell the heartbeat once it stands still for a moment; while the worker moves, nobody needs it."""
        if self.member is None:
            return
        before, self.seen = self.seen, self._now()
        if self.seen != self.told and (always or self.seen == before):
            self.told = self.seen
            self.control.send(("beat", self.seen))

    def close(self) -> list[str]:
        """End the worker, if any; returns what it had left running."""
        if self.member is None:
            return []
        left = self.member.close()
        remove_folder(self.member.home.folder)
        self.member = None
        return left


def free_address() -> str:
    """Where a store can listen now: this node's address as torchrun knows it, and a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{probe.getsockname()[1]}"


def main(address: str) -> None:
    """Serve one controller after another, for ever; torchrun ends it."""
    rank = int(os.environ.get("RANK", "0"))
    while True:
        try:
            control = connection.Client(parse_address(address), authkey=key())
        except (OSError, EOFError):
            time.sleep(RETRY)  # no controller yet
            continue
        control.send(rank)
        server = Relay(rank, control)
        with contextlib.suppress(EOFError, OSError):
            server.run()
        server.close()


if __name__ == "__main__":
    main(sys.argv[1])
