"""How a process of the harness is started: not with the caller's script run once more in it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import ModuleType


def start(process: BaseProcess) -> None:
    """Start a process of a fork server."""
    with _without_main():
        process.start()


@contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing imports the caller's main module in each process: a script that may have no guard, or pytest."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
