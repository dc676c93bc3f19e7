"""The files of a checkpoint, read by offsets: few large requests, several under way at once.

Mapped pages of a file are faulted in one after the other, and where ranks keep halves of tensors each fault is a short
request of its own: columns of Qwen3-30B-A3B took two ranks 13.0 s, 1.5 times what one GPU took for all, and read by
offsets 7.2, as fast as the disk (suites/performance/data/loading_readers_h200x2.json).  Here threads read runs of whole
rows into a few buffers, ahead of whoever copies them on, so that the host holds these buffers and nothing else of the
files.

A safetensors file is 8 bytes with the length of its header, the header, a JSON object of {key: dtype, shape, the first
and the last byte}, and the bytes of the tensors (github.com/huggingface/safetensors, "Format").
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe.config import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
READERS = 8  # threads
BLOCK = 8 << 20  # bytes of one buffer
REASONS = "was the download complete, and is config.json this checkpoint's own?"


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: which one, and where its first byte lies."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of a stored tensor, as many as go into a buffer."""

    stored: Stored
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.stored.row_bytes


def opened(file: Path) -> dict[str, Stored]:
    """What a file holds.

    Raises:
        CheckpointError: no safetensors file, or not all of it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu"):  # looks at every entry, and at the size of the file
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(
            f"{file}: got {size:,} bytes that are no whole safetensors file ({error}); {REASONS}"
        ) from error
    return {
        key: Stored(file, key, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def runs(stored: Stored, rows: range) -> Iterator[Run]:
    """`rows` in runs of up to BLOCK bytes, of one row at least."""
    each = max(1, BLOCK // max(1, stored.row_bytes))
    for start in range(rows.start, rows.stop, each):
        yield Run(stored, start, min(start + each, rows.stop))


def read(wanted: Iterable[Run], pinned: bool = False) -> Iterator[tuple[Run, Tensor]]:
    """Each run with its rows, in order; they are valid until the next one is asked for.

    Args:
        pinned: the buffers are such that a GPU copies from them at full speed.

    Raises:
        CheckpointError: a file that ends early.
    """
    free = [torch.empty(0, dtype=torch.uint8) for _ in range(READERS + 2)]  # one is looked at, one waits for a reader
    under_way: deque[tuple[Run, Future[Tensor]]] = deque()
    left = iter(wanted)
    with ThreadPoolExecutor(READERS) as readers:
        try:
            while True:
                while free and (run := next(left, None)) is not None:
                    buffer = _large_enough(free.pop(), run.bytes, pinned)
                    under_way.append((run, readers.submit(_fill, run, buffer)))
                if not under_way:
                    return
                run, filled = under_way.popleft()
                buffer = filled.result()
                yield run, _rows(run, buffer)
                free.append(buffer)
        finally:
            for _, waiting in under_way:
                waiting.cancel()


def _large_enough(buffer: Tensor, size: int, pinned: bool) -> Tensor:
    """`buffer`, or a larger one: made by whoever reads, since what a thread has let go of stays its own."""
    return buffer if buffer.numel() >= size else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def _fill(run: Run, buffer: Tensor) -> Tensor:
    """`buffer` with the bytes of `run` in front."""
    view, at = memoryview(buffer.numpy().data)[: run.bytes], run.stored.offset + run.start * run.stored.row_bytes
    descriptor = os.open(run.stored.file, os.O_RDONLY)
    try:
        while view:
            count = os.preadv(descriptor, [view], at)
            if not count:
                raise CheckpointError(f"{run.stored.file}: it ends in the middle of {run.stored.key}; {REASONS}")
            view, at = view[count:], at + count
    finally:
        os.close(descriptor)
    return buffer


def _rows(run: Run, buffer: Tensor) -> Tensor:
    return buffer[: run.bytes].view(DTYPES[run.stored.dtype]).view(run.stop - run.start, *run.stored.shape[1:])
