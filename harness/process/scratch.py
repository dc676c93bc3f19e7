"""Temporary folders of a run.  One whose owner was killed is removed when the next is made.

The owner holds a lock on a file in the folder for as long as it lives; the system lets go of it, however it ends.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX, NEW = "moe-harness-run-", "moe-harness-new-"
LOCK = "owner.lock"


def make() -> str:
    """A new folder for this process alone; removes those whose owners are gone."""
    _sweep(Path(tempfile.gettempdir()))
    fresh = Path(tempfile.mkdtemp(prefix=NEW))
    held = _locked(fresh)
    folder = str(fresh.rename(fresh.with_name(PREFIX + fresh.name.removeprefix(NEW))))  # swept only from now on
    _HELD[folder] = held
    return folder


def remove(folder: str) -> None:
    """Remove a folder that `make` made."""
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
    """Remove what `make` made and nobody holds; a folder without our file is somebody's own."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid() or not (folder / LOCK).is_file():
                continue
            held = _locked(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
