"""CUDA graphs of code that may not be captured."""

from collections.abc import Callable
from typing import Any

import torch


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(graph, result) of `run`, which has run before.

    Raises what `run` or the end of the capture raises; PyTorch is as usable then as it was before.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            return graph, run()
    except Exception:
        restore_generator()
        raise


def restore_generator() -> None:
    """Give PyTorch's default generator a new state: a capture that failed leaves it waiting for its end for ever."""
    fresh = torch.Generator("cuda").manual_seed(0).graphsafe_get_state()
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
