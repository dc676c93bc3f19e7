"""CUDA graphs of code that may not be captured."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(graph, result) of `run`, which has run before.

    Raises what `run` or the end of the capture raises; PyTorch is as usable then as it was before.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with collector_at_rest(), torch.cuda.graph(graph):
            return graph, run()
    except Exception:
        restore_generator()
        raise


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Python's collector does not run: what it gives back may be of CUDA, and spoil a capture that is right."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def restore_generator() -> None:
    """Give PyTorch's default generator a new state: a capture that failed leaves it waiting for its end for ever."""
    fresh = torch.Generator("cuda").manual_seed(0).graphsafe_get_state()
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
