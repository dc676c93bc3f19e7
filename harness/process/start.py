"""The server that forks every process of the harness, and how one is started: without the caller's script run in it."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

_ONE_AT_A_TIME = threading.Lock()  # the kill matrix starts processes from several threads
# A program has one such server, whoever asks first: it imports what any process needs, 2 s that each would take alone.
PRELOADED = ["moe_harness.harness.process.worker", "moe_harness.harness.ranks.worker", "scipy.special"]


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
