"""Capturing a CUDA graph."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture into `graph`, with the options of torch.cuda.graph, while Python's collector rests.

    What the collector finds may be of CUDA: an older graph, memory mapped over ranks, of a model that is gone.  Giving
    it back is not allowed while this thread captures, and where it fails within a destructor the process ends, which
    is what one of 34 tests of graphs over two H200s was probably ended by.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        if collects:
            gc.enable()
