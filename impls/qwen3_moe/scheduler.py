"""Which sequences run in the next step, and with how many tokens.

A step holds one token of every sequence that decodes, and beside them chunks of prompts up to a budget of tokens.  The
host plans a step while the one before it runs: a sampled token counts as soon as its step is planned, though its value
is still on the device.  What a planned step writes may be read, and its pages given away, by every later step, because
the device runs steps in order.

When pages run out the youngest running sequence gives its pages back and waits; it starts over with the tokens it has,
which gives the same tokens as if nothing had happened.
"""

from collections import deque
from dataclasses import dataclass

from moe_harness.impls.qwen3_moe.pages import ROOT, Pages
from moe_harness.impls.qwen3_moe.sequence import Request, Sequence, Status

# Tokens of a step in which prompts go beside sequences that decode: products hide behind weights that are read anyway,
# and with fewer the host takes longer to launch a step than the device to run it (Qwen3-30B-A3B on an H200).  It is the
# sum that stays the same from step to step: a number of rows that is new costs the host about as much again, because
# each kernel is looked up anew (impls/triton/NOTES.md).
BESIDE = 2048


class Refused(ValueError):
    """A request that this engine can never finish; the message says why."""


@dataclass(frozen=True)
class Work:
    """Tokens [start, start + count) of a sequence in one step; `samples`: its next token comes out of it."""

    sequence: Sequence
    start: int
    count: int
    samples: bool

    @property
    def decodes(self) -> bool:
        return self.count == 1 and self.samples


@dataclass(frozen=True)
class Step:
    """Work of one step: that of `decoding` sequences first, one token each, then chunks."""

    work: list[Work]
    decoding: int

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


class Scheduler:
    """Continuous batching over one pool of pages.

    Args:
        max_sequences: sequences that run at once.
        max_tokens: query tokens of one step, at least max_sequences; BESIDE at most where prompts go beside others that
            decode, but half as many of prompts in any case.
        max_length: positions of one sequence.

    Raises:
        ValueError: limits that no step can keep.
    """

    def __init__(self, pages: Pages, *, max_sequences: int, max_tokens: int, max_length: int):
        if not 1 <= max_sequences <= max_tokens:
            raise ValueError(f"max_tokens is {max_tokens}, wanted at least max_sequences = {max_sequences} >= 1")
        self.pages, self.max_sequences, self.max_tokens, self.max_length = pages, max_sequences, max_tokens, max_length
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.rows = list(range(max_sequences))[::-1]  # free places in the device's buffers, the next one last
        self.preemptions = self.found_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def refuse(self, request: Request) -> None:
        """Raises Refused, with the reason, for a request that this engine can never finish."""
        prompt, new = len(request.prompt), request.max_new_tokens
        if prompt < 1:
            raise Refused("the prompt is empty, wanted at least one token")
        if new < 1:
            raise Refused(f"max_new_tokens is {new}, wanted at least 1")
        if prompt + new > self.max_length:
            raise Refused(
                f"{prompt} prompt tokens and {new} new ones are {prompt + new} positions, wanted at most "
                f"{self.max_length}"
            )
        needed = self.pages.needed(prompt + new - 1)  # the last token is never an input
        if needed > self.pages.total:
            raise Refused(
                f"{prompt} prompt tokens and {new} new ones fill {needed} pages of {self.pages.size} tokens, wanted at "
                f"most the {self.pages.total} there are"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; raises Refused as `refuse` does."""
        self.refuse(sequence.request)
        self.waiting.append(sequence)

    def plan(self) -> Step | None:
        """The next step, which counts as computed from now on; None where nothing can run before tokens come back."""
        for sequence in self.running:  # before this step's own work is counted: it may not be found within the step
            self._remember(sequence)
        chosen: dict[Sequence, int] = {}
        preempted = self.preemptions
        for sequence in list(self.running):
            if sequence.unread == 1 and not sequence.complete and self._make_room(sequence, chosen):
                chosen[sequence] = 1
        budget = self.max_tokens - len(chosen)
        if chosen:
            budget = min(budget, max(BESIDE - len(chosen), BESIDE // 2))
        for sequence in self.running:
            if sequence.unread > 1 and budget:
                chosen[sequence] = min(sequence.unread, budget)
                budget -= chosen[sequence]
        while budget and self.preemptions == preempted and (newcomer := self._admit()) is not None:
            chosen[newcomer] = min(newcomer.unread, budget)
            budget -= chosen[newcomer]
        work = [self._count(s, n) for s, n in chosen.items()]
        # Attention starts its programs in this order: the longest first, so that none of them is alone at the end.
        decoding = sorted((w for w in work if w.decodes), key=lambda w: -w.start)
        return Step([*decoding, *(w for w in work if not w.decodes)], len(decoding)) if work else None

    def complete(self, step: Step, tokens: list[int]) -> list[tuple[Sequence, int]]:
        """Take in the sampled tokens of a step, in the order of its work; those that count, with their sequences.

        A sequence that ended meanwhile, by a stop token or an abort, takes nothing more.
        """
        taken = []
        sampled = [work.sequence for work in step.work if work.samples]
        for sequence, token in zip(sampled, tokens, strict=True):
            sequence.pending -= 1
            if not sequence.alive:
                continue
            sequence.tokens.append(token)
            taken.append((sequence, token))
            if token in sequence.request.stop_ids or len(sequence.new_tokens) == sequence.request.max_new_tokens:
                self.end(sequence, Status.FINISHED)
        return taken

    def end(self, sequence: Sequence, status: Status) -> None:
        """Take a living sequence out, finished or aborted; its pages are free at once."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = status

    def check(self) -> None:
        """AssertionError where pages, rows and queues do not add up."""
        self.pages.check([sequence.table for sequence in self.running])
        rows = [sequence.row for sequence in self.running]
        assert sorted([*rows, *self.rows], key=str) == sorted(range(self.max_sequences), key=str), "rows do not add up"
        assert all(s.status is Status.RUNNING for s in self.running), "a sequence runs that should not"
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING, f"sequence {sequence.number} waits as {sequence.status}"
            assert not sequence.table and sequence.row is None and not sequence.computed, "who waits holds something"
        for sequence in self.running:
            held = len(sequence.table) * self.pages.size
            assert sequence.computed <= min(held, sequence.length), f"sequence {sequence.number} ran past its tokens"

    def _make_room(self, sequence: Sequence, chosen: dict[Sequence, int]) -> bool:
        """Whether there is a page for the next token; the youngest give theirs, the sequence itself if it is one."""
        while sequence.status is Status.RUNNING and self.pages.needed(sequence.computed + 1) > len(sequence.table):
            if self.pages.free:
                sequence.table.append(self.pages.take())
            else:
                chosen.pop(self.running[-1], None)
                self._preempt(self.running[-1])
        return sequence.status is Status.RUNNING

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Give back what a running sequence holds."""
        self._remember(sequence)
        self.running.remove(sequence)
        self.pages.release(sequence.table)
        assert sequence.row is not None
        self.rows.append(sequence.row)
        sequence.table, sequence.row = [], None
        sequence.computed = sequence.known = 0
        sequence.prefix = ROOT

    def _admit(self) -> Sequence | None:
        """The next waiting sequence with pages for all its tokens, or None where none may run yet.

        One that was preempted waits until its last token is back: it starts over with the values.
        """
        if not self.waiting or not self.rows or self.waiting[0].pending:
            return None
        sequence, pages = self.waiting[0], self.pages
        matched = pages.match(sequence.tokens)
        fresh = pages.needed(len(sequence.tokens)) - len(matched)
        if fresh > len(pages.free) - pages.cost(matched):
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        pages.hold(matched)
        sequence.table = matched + [pages.take() for _ in range(fresh)]
        sequence.status, sequence.row = Status.RUNNING, self.rows.pop()
        sequence.computed, sequence.known = len(matched) * pages.size, len(matched)
        sequence.prefix = pages.identity[matched[-1]] if matched else ROOT
        self.found_tokens += sequence.computed
        return sequence

    def _count(self, sequence: Sequence, count: int) -> Work:
        work = Work(sequence, sequence.computed, count, samples=count == sequence.unread)
        sequence.computed += count
        sequence.pending += work.samples
        return work

    def _remember(self, sequence: Sequence) -> None:
        """Offer full pages whose tokens are known and computed to sequences of later steps."""
        size = self.pages.size
        full = min(sequence.computed, len(sequence.tokens)) // size
        while self.pages.prefixes and sequence.known < full:
            start = sequence.known * size
            tokens = tuple(sequence.tokens[start : start + size])
            sequence.prefix = self.pages.remember(sequence.prefix, tokens, sequence.table[sequence.known])
            sequence.known += 1
