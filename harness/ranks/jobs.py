"""What controller and workers say to each other: plain data, no tensor and no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.heartbeat import Heartbeat

INJECTIONS = {
    "die": "the process is killed",
    "raise": "an exception is raised",
    "exit": "the process leaves with status 0",
    "hang": "the process stops for good",
    "late": "the process comes late, but comes",
    "nan": "the first element of the payload becomes NaN",
    "swap": "this call and the next are made in the other order",
    "split": "one row is claimed for the next member instead of its own",
    "dtype": "the payload is sent as another dtype",
}


@dataclass(frozen=True)
class Injection:
    """Which rank does what at which of its collectives, counted from 0."""

    kind: str
    rank: int
    call: int

    def __post_init__(self) -> None:
        if self.kind not in INJECTIONS:
            raise ValueError(f"kind is {self.kind!r}, but should be one of {', '.join(INJECTIONS)}")


@dataclass(frozen=True)
class Job:
    """What every rank of a pool is asked to run: `task` is "package.module:function"."""

    task: str
    spec: Any
    seed: int = 0
    injection: Injection | None = None
    number: int = 0  # counts the jobs of a pool, so that nobody takes a sign of life for that of another job


@dataclass(frozen=True)
class Reply:
    """What one rank says about one job: a plain result, or how it failed; and its calls."""

    result: Any = None
    error: str | None = None  # "Type: message"
    trace: str = ""
    failed_call: RecordedCall | None = None  # the collective that the exception came out of
    calls: list[RecordedCall] = field(default_factory=list)
    whose: str = ""  # whose the error is where not the implementation's: "judge", "machine", or "missing" packages


@dataclass(frozen=True)
class Exit:
    """A worker is gone; a negative code is the signal that ended it."""

    code: int


@dataclass(frozen=True)
class Home:
    """Where a pool's workers meet: the files of their store, of their heartbeat and of what they print."""

    folder: str
    world_size: int
    backend: str
    address: str = ""  # host:port of a store over the network; a file in the folder otherwise

    def store(self) -> Path:
        return Path(self.folder) / "store"

    def log(self, rank: int) -> Path:
        """What the worker and the libraries in it print."""
        return Path(self.folder) / f"rank{rank}.log"

    def journal(self, rank: int) -> Path:
        """The calls of the job at hand, one JSON line each, for when the rank cannot tell them any more."""
        return Path(self.folder) / f"rank{rank}.calls"

    def heartbeat(self, *, create: bool = False) -> Heartbeat:
        return Heartbeat(Path(self.folder) / "heartbeat", self.world_size, create=create)
