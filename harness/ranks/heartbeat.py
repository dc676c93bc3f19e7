"""Shared memory in which each rank says what it is doing, so that the controller can prove a deadlock.

One slot per rank: a counter that is odd while the slot is being written, a state, and the pending call as JSON.
A rank writes twice per collective (waiting, running), which costs a few microseconds; the controller only reads.
"""

import json
import mmap
import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from moe_harness.harness.ranks.calls import RecordedCall

SLOT = 4096
_HEADER = struct.Struct("<qqqq")  # sequence, state, length of the text, number of the job


class State(IntEnum):
    IDLE = 0  # no task
    RUNNING = 1  # between collectives; the call told with it is the last one finished
    WAITING = 2  # inside a collective or waiting for one, with all its threads
    DONE = 3  # the task returned or raised
    OPEN = 4  # a thread is inside a collective, but what it waits for may come from another thread, or from anybody


class RankStatus(NamedTuple):
    """What one rank said last."""

    sequence: int
    state: State
    call: RecordedCall | None = None
    job: int = 0  # the job that this was said about


class Heartbeat:
    """The shared memory of one pool, in a file made by the controller and opened by each worker."""

    def __init__(self, path: Path, world_size: int, *, create: bool = False):
        if create:
            path.write_bytes(bytes(SLOT * world_size))
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), SLOT * world_size)

    def write(self, rank: int, state: State, text: bytes = b"", job: int = 0) -> None:
        """Replace what `rank` says; `text` is its call as JSON.  Only that rank may call this."""
        start = rank * SLOT
        sequence = _HEADER.unpack_from(self.memory, start)[0]
        text = text if len(text) <= SLOT - _HEADER.size else b""
        _HEADER.pack_into(self.memory, start, sequence + 1, state, len(text), job)
        self.memory[start + _HEADER.size : start + _HEADER.size + len(text)] = text
        _HEADER.pack_into(self.memory, start, sequence + 2, state, len(text), job)

    def read(self, rank: int) -> RankStatus:
        """What `rank` said last; a slot caught while it is written counts as running."""
        start = rank * SLOT
        before, state, length, job = _HEADER.unpack_from(self.memory, start)
        text = bytes(self.memory[start + _HEADER.size : start + _HEADER.size + length])
        after = _HEADER.unpack_from(self.memory, start)[0]
        if before != after or before % 2:
            return RankStatus(after, State.RUNNING, None, job)
        return RankStatus(before, State(state), RecordedCall.from_dict(json.loads(text)) if text else None, job)

    def close(self) -> None:
        self.memory.close()
