"""A matrix judged in parts: a share of the faults on each of several machines, or a run that goes on where it stopped.

A part is what `moe-harness faults --json` writes, complete or not; parts of one matrix have been asked the same.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from moe_harness.harness.core.catalogue import Fault
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.proof.kill_matrix import Matrix, MatrixOptions, Row, matrix
from moe_harness.harness.proof.kill_matrix_view import write_json

EVERY = 10.0  # seconds between two writes of what has been judged so far


def share(faults: list[Fault], which: str) -> list[Fault]:
    """The faults of share `which`, "2/5" for the second of five; stages are spread evenly over the shares.

    Raises:
        UsageError: it is no such share.
    """
    number, _, count = which.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard is {which!r}, but should be a number of a share and how many there are, such as 2/5")
    return faults[int(number) - 1 :: int(count)]


def read(paths: Iterable[Path], options: MatrixOptions) -> list[Matrix]:
    """Earlier parts; UsageError for what is no matrix, or was asked something else."""
    asked = {"profile": options.request.profile, "device": options.request.device, "seed": options.request.seed,
             "after_first_kill": options.after_first}  # fmt: skip
    return [_read(path, asked) for path in paths]


def _read(path: Path, asked: dict[str, Any]) -> Matrix:
    try:
        found = json.loads(path.read_text())
        complete = all(row.keys() >= {"fault", "seconds", "killing", "checks"} for row in found["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--known {path}: it should be what `moe-harness faults --json` wrote ({error!r})") from error
    if not complete:
        raise UsageError(f"--known {path}: rows of it lack what `moe-harness faults --json` writes")
    for name, wanted in asked.items():
        if found.get(name) != wanted:
            raise UsageError(f"--known {path}: its {name} is {found.get(name)!r}, here it is {wanted!r}: "
                             "the two are no parts of one matrix")  # fmt: skip
    return found


class Kept:
    """The rows of a run and of the parts before it, written as they come: what ends a run costs seconds of it.

    Args:
        path: where they are written, if anywhere.
        options: what was asked.
        earlier: parts read before; of a fault judged twice the later row stands.
        order: the faults of the whole, in their order.
    """

    def __init__(self, path: Path | None, options: MatrixOptions, earlier: list[Matrix], order: list[Fault]) -> None:
        self._path, self._options, self._order = path, options, [fault.name for fault in order]
        self._rows = {row["fault"]: row for part in earlier for row in part["rows"]}
        self._lock, self._written = Lock(), time.monotonic()

    def add(self, row: Row) -> None:
        """One more row; called from any of the judging threads."""
        with self._lock:
            self._rows[row["fault"]] = row
            if self._path is not None and time.monotonic() > self._written + EVERY:
                beside = self._path.with_name(self._path.name + ".part")
                write_json(self.matrix(), beside)
                beside.replace(self._path)
                self._written = time.monotonic()

    def matrix(self) -> Matrix:
        """What is known of the faults so far."""
        return matrix([self._rows[name] for name in self._order if name in self._rows], self._options)
