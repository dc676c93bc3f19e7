"""A device without a model: the next token is a hash of all tokens that a sequence sees through its pages.

It reads nothing but the block that `batch.Builder` made, as a real device does: token ids, slots, tables, lengths.  A
page given to the wrong sequence, a stale table, a slot of another chunk, a token dropped or doubled: each changes the
hash and with it every token that follows.  It is as unkind as a real device may be:

- it looks at the block as late as it can, after the host has begun the next one;
- what a block does not hold was garbage before;
- keys that the same step writes for another sequence are not there yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from moe_harness.impls.qwen3_moe.batch import ON_DEVICE, Builder, Filled, Limits
from moe_harness.impls.qwen3_moe.engine import Engine
from moe_harness.impls.qwen3_moe.pages import Pages
from moe_harness.impls.qwen3_moe.scheduler import Step

VOCABULARY = 50
UNWRITTEN = -3
START = 0
GARBAGE = -7


def link(before: int, token: int) -> int:
    """The keys of a position: they depend on its token and, as in deep layers, on all before it."""
    return hash((before, token))


def next_token(keys: Iterable[int]) -> int:
    """What follows positions with these keys."""
    return hash(tuple(keys)) % VOCABULARY


def continuation(prompt: tuple[int, ...], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The tokens that a right engine generates."""
    keys = list(accumulate(prompt, link, initial=START))[1:]
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(next_token(keys))
        keys.append(link(keys[-1], tokens[-1]))
        if tokens[-1] in stop:
            break
    return tokens


@dataclass
class FakeLaunched:
    """A step under way on the fake device."""

    step: Step
    device: "FakeDevice"
    tokens: list[int] | None = None

    def result(self) -> list[int]:
        self.device.run()
        assert self.tokens is not None
        return self.tokens


class FakeDevice:
    """`launch` as the runner has it, with every decoding step padded to a bucket."""

    def __init__(self, limits: Limits, pages: int):
        self.limits = limits
        self.builder = Builder(limits, torch.device("cpu"))
        self.cache = [UNWRITTEN] * (pages * limits.page_size)
        self.last_tokens = [GARBAGE] * (limits.sequences + 1)
        self.queue: list[tuple[FakeLaunched, dict[str, np.ndarray], Filled, int]] = []

    def launch(self, step: Step) -> FakeLaunched:
        decoding = step.decoding == len(step.work)
        padded = 0 if not decoding else min(self.limits.sequences, -(-len(step.work) // 4) * 4)
        _, fields = self.builder.hosts[self.builder.turn]
        for field in fields.values():
            field.fill(GARBAGE)
        filled = self.builder.carry(step, padded)
        self.run()  # the step before looks at its block only now
        self.queue.append((FakeLaunched(step, self), fields, filled, padded))
        return self.queue[-1][0]

    def run(self) -> None:
        """Everything that was launched, in order."""
        while self.queue:
            launched, fields, filled, padded = self.queue.pop(0)
            launched.tokens = self._run(fields, filled, padded)
            self._check_samplers(launched.step, fields)

    def _run(self, b: dict[str, np.ndarray], filled: Filled, padded: int) -> list[int]:
        self._check_pads(b, filled, padded)
        ids = b["ids"][: filled.tokens].tolist()
        for s in range(filled.decoding):
            ids[s] = self.last_tokens[b["rows"][s]] if ids[s] == ON_DEVICE else ids[s]
        assert all(0 <= i < VOCABULARY for i in ids), f"token ids {ids}"
        size, before, seen = self.limits.page_size, list(self.cache), {}
        for s in range(filled.sequences):
            start, stop = b["query_start"][s : s + 2]
            context, first = int(b["context"][s]), int(b["positions"][start])
            slots = [int(b["tables"][s, p // size]) * size + p % size for p in range(context)]
            assert b["positions"][start:stop].tolist() == list(range(first, context)), "queries end with the last key"
            last = before[slots[first - 1]] if first else START
            for t in range(start, stop):
                last = self.cache[b["slots"][t]] = link(last, ids[t])
            seen[stop - 1] = tuple(before[slot] for slot in slots[:first]) + tuple(
                self.cache[slot] for slot in slots[first:]
            )
        tokens = []
        for r in range(filled.sampling):
            history = seen[int(b["last"][r])]
            assert len(history) == b["draws"][r], f"the draw is for position {b['draws'][r]} of {len(history)}"
            tokens.append(next_token(history))
        for r, token in enumerate(tokens):
            self.last_tokens[b["rows"][r]] = token
        return tokens

    def _check_pads(self, b: dict[str, np.ndarray], filled: Filled, padded: int) -> None:
        """Pad rows are inert: a token of the vocabulary, no keys, no slot, a result that goes nowhere."""
        rest = slice(filled.sequences, padded)
        wanted = {
            "slots": -1, "context": 0, "rows": self.limits.sequences, "temperature": 0, "positions": 0, "tables": 0,
            "seeds": 0, "draws": 0,
        }  # fmt: skip
        for name, value in wanted.items():
            assert (b[name][rest] == value).all(), f"pad rows have the {name} {b[name][rest]}"
        assert ((b["ids"][rest] >= 0) & (b["ids"][rest] < VOCABULARY)).all(), f"pad rows have ids {b['ids'][rest]}"
        if padded:
            starts = b["query_start"][filled.sequences : padded + 1]
            assert (np.diff(starts) == 1).all(), f"pad rows start at {starts}"
            assert (b["last"][rest] == np.arange(filled.sequences, padded)).all()

    def _check_samplers(self, step: Step, b: dict[str, np.ndarray]) -> None:
        sampling = [work.sequence.request for work in step.work if work.samples]
        for r, request in enumerate(sampling):
            got = (b["temperature"][r], b["top_k"][r], b["top_p"][r], b["seeds"][r])
            wanted = (request.temperature, request.top_k or 0, request.top_p or 1.0, request.seed)
            assert np.allclose(got, wanted, rtol=np.finfo(np.float32).eps), f"row {r} samples with {got}, not {wanted}"


def engine(
    *, pages: int = 8, page_size: int = 2, sequences: int = 4, tokens: int = 8, length: int = 64, prefixes: bool = True
) -> Engine:
    """An engine over the fake device."""
    limits = Limits(tokens, sequences, max(1, -(-(length - 1) // page_size)), page_size)
    return Engine(
        FakeDevice(limits, pages), Pages(pages, page_size, prefixes),
        max_sequences=sequences, max_tokens=tokens, max_length=length,
    )  # fmt: skip
