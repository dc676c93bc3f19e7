"""How a process of the harness is started: not with the caller's script run once more in it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import ModuleType

_ONE_AT_A_TIME = threading.Lock()  # the kill matrix starts processes from several threads


def start(process: BaseProcess) -> None:
    """Start a process of a fork server."""
    with _ONE_AT_A_TIME, _without_main():
        process.start()


@contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing imports the caller's main module in each process: a script that may have no guard, or pytest."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
