"""A planned step as arrays: filled on the host, carried to the device in one copy.

Every field has a fixed place in one block of bytes, so that the block on the device can be part of a CUDA graph.  The
host has two blocks, in pinned memory where there is a GPU: one may still be on its way while the next step is written.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe.scheduler import Step

ON_DEVICE = -1  # instead of a token id: the row's last sampled token
BLOCKS = 2
SAMPLED = ("last", "rows", "temperature", "seeds", "top_k", "top_p", "draws")  # fields per sequence that samples


@dataclass(frozen=True)
class Limits:
    """The largest step: `tokens` queries of `sequences` sequences with `columns` pages each."""

    tokens: int
    sequences: int
    columns: int
    page_size: int

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every field of a block.

        ids, positions, slots per token.  query_start, context, tables and states (the row in which linear attention
        keeps what it knows) per sequence, in the order of the step's work.
        plan: a fingerprint of the step, by which ranks find out that they do the same.
        last (index of its last token), rows, temperature, top_k, top_p, seeds and draws (position that is drawn) per
        sequence that samples, in order.
        """
        t, s, whole = self.tokens, self.sequences, torch.int32
        return {
            "plan": (torch.int64, (1,)), "seeds": (torch.int64, (s,)), "draws": (torch.int64, (s,)),
            "last": (torch.int64, (s,)), "rows": (torch.int64, (s,)), "ids": (torch.int64, (t,)),
            "positions": (whole, (t,)), "slots": (whole, (t,)), "query_start": (whole, (s + 1,)),
            "context": (whole, (s,)), "tables": (whole, (s, self.columns)), "temperature": (torch.float32, (s,)),
            "top_k": (whole, (s,)), "top_p": (torch.float32, (s,)), "states": (torch.int64, (s,)),
        }  # fmt: skip


def views(limits: Limits, block: Tensor) -> dict[str, Tensor]:
    """The fields inside a block of bytes."""
    found, at = {}, 0
    for name, (dtype, shape) in limits.fields().items():
        size = int(np.prod(shape)) * dtype.itemsize
        found[name] = block[at : at + size].view(dtype).view(shape)
        at += -(-size // 16) * 16
    return found


def size(limits: Limits) -> int:
    """Bytes of a block."""
    return sum(-(-int(np.prod(shape)) * dtype.itemsize // 16) * 16 for dtype, shape in limits.fields().values())


@dataclass(frozen=True)
class Filled:
    """How much of a block a step uses; pad rows are not counted in."""

    tokens: int
    sequences: int
    decoding: int
    sampling: int
    cut: bool  # some row asks for top_k or top_p


def _fingerprint(parts: Iterable[np.ndarray], start: int) -> int:
    for part in parts:
        start = zlib.crc32(part.tobytes(), start)
    return start


class Builder:
    """Turns steps into blocks on `device`."""

    def __init__(self, limits: Limits, device: torch.device):
        self.limits = limits
        pinned = device.type == "cuda"
        blocks = [torch.zeros(size(limits), dtype=torch.uint8, pin_memory=pinned) for _ in range(BLOCKS)]
        self.hosts = [(block, {name: view.numpy() for name, view in views(limits, block).items()}) for block in blocks]
        self.arrived = [torch.cuda.Event() for _ in blocks] if pinned else None
        self.block = torch.zeros(size(limits), dtype=torch.uint8, device=device)
        self.device = views(limits, self.block)
        self.tables = np.zeros((limits.sequences, limits.columns), np.int32)  # by row, kept from step to step
        self.owners: list[list[int] | None] = [None] * limits.sequences
        self.filled = [0] * limits.sequences
        self.turn = 0

    def carry(self, step: Step, padded: int = 0) -> Filled:
        """Write `step` into the block on the device, with pad rows behind up to `padded` sequences of one token."""
        host, fields = self.hosts[self.turn]
        if self.arrived is not None:
            self.arrived[self.turn].synchronize()  # the block's last journey
        filled = self._fill(step, fields)
        if padded:
            self._pad(fields, filled.sequences, padded)
        self.block.copy_(host, non_blocking=True)
        if self.arrived is not None:
            self.arrived[self.turn].record()
        self.turn = (self.turn + 1) % BLOCKS
        return filled

    def _fill(self, step: Step, to: dict[str, np.ndarray]) -> Filled:
        page, at, sampling, cut = self.limits.page_size, 0, 0, False
        to["query_start"][0] = 0
        starts = np.array([work.start for work in step.work], np.int32)
        counts = np.array([work.count for work in step.work], np.int32)
        rows = [self._row(work.sequence.row, work.sequence.table) for work in step.work]
        n = len(rows)
        np.take(self.tables, rows, axis=0, out=to["tables"][:n])
        np.cumsum(counts, out=to["query_start"][1 : n + 1])
        to["context"][:n], to["states"][:n] = starts + counts, rows
        d = step.decoding
        to["positions"][:d] = starts[:d]
        to["slots"][:d] = to["tables"][np.arange(d), starts[:d] // page] * page + starts[:d] % page
        for s, work in enumerate(step.work):
            sequence, request = work.sequence, work.sequence.request
            stop = work.start + work.count
            if s < d:
                here = work.start < len(sequence.tokens)
                to["ids"][at] = sequence.tokens[work.start] if here else ON_DEVICE
            else:
                span = slice(at, at + work.count)
                to["ids"][span] = sequence.tokens[work.start : stop]
                positions = np.arange(work.start, stop, dtype=np.int32)
                to["positions"][span] = positions
                to["slots"][span] = to["tables"][s, positions // page] * page + positions % page
            at += work.count
            if work.samples:
                to["last"][sampling], to["rows"][sampling] = at - 1, rows[s]
                to["temperature"][sampling], to["seeds"][sampling] = request.temperature, request.seed
                to["top_k"][sampling], to["top_p"][sampling] = request.top_k or 0, request.top_p or 1.0
                to["draws"][sampling] = stop
                cut |= request.top_k is not None or request.top_p is not None
                sampling += 1
        used = {"ids": at, "positions": at, "slots": at, "context": n} | dict.fromkeys(SAMPLED, sampling)
        to["plan"][0] = _fingerprint((to[name][:count] for name, count in used.items()), d)
        return Filled(at, n, d, sampling, cut)

    def _row(self, row: int | None, table: list[int]) -> int:
        """The row, its table up to date: a sequence only ever appends pages to the list it has."""
        assert row is not None
        if self.owners[row] is not table:
            self.owners[row], self.filled[row] = table, 0
            self.tables[row] = 0
        have = self.filled[row]
        if have < len(table):
            self.tables[row, have : len(table)] = table[have:]
            self.filled[row] = len(table)
        return row

    def _pad(self, to: dict[str, np.ndarray], used: int, padded: int) -> None:
        """Rows that hold no sequence: token 0, no keys, no slot, and a last token that goes nowhere."""
        rest = slice(used, padded)
        for name, value in (("ids", 0), ("positions", 0), ("slots", -1), ("context", 0), ("tables", 0), ("seeds", 0)):
            to[name][rest] = value
        for name, value in (
            ("draws", 0),
            ("rows", self.limits.sequences),
            ("states", self.limits.sequences),
            ("temperature", 0),
            ("top_k", 0),
            ("top_p", 1),
        ):
            to[name][rest] = value
        to["last"][rest] = np.arange(used, padded)
        to["query_start"][used + 1 : padded + 1] = np.arange(used + 1, padded + 1)
