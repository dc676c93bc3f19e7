"""The engine: requests in, tokens out, one step at a time, the host one step ahead of what it has read.

    engine.add(request) -> number        engine.step() -> [Output]       engine.abort(number)
    engine.generate(requests)            engine.stream(request)          engine.check()

`step` plans and starts the next step first and then reads the tokens of the one before, so the device never waits for
Python.  A sequence that meets a stop token therefore runs for one step more, whose token is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from moe_harness.impls.qwen3_moe.pages import Pages
from moe_harness.impls.qwen3_moe.scheduler import Refused, Scheduler, Step
from moe_harness.impls.qwen3_moe.sequence import Request, Sequence, Status


class Running(Protocol):
    """A step under way."""

    @property
    def step(self) -> Step: ...

    def result(self) -> list[int]: ...


class Device(Protocol):
    """What runs steps: `runner.Runner`, or a stand-in in tests of everything else."""

    def launch(self, step: Step) -> Running: ...


@dataclass(frozen=True)
class Output:
    """One token of a sequence; `finished`: it is the last one."""

    number: int
    token: int
    finished: bool


class Engine:
    """Continuous batching over a runner.

    Args:
        max_sequences, max_tokens, max_length: as in `Scheduler`.
    """

    def __init__(self, runner: Device, pages: Pages, *, max_sequences: int, max_tokens: int, max_length: int):
        self.runner = runner
        self.scheduler = Scheduler(pages, max_sequences=max_sequences, max_tokens=max_tokens, max_length=max_length)
        self.sequences: dict[int, Sequence] = {}  # the living ones
        self.under_way: Running | None = None
        self.added = self.steps = self.computed = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.under_way is not None or self.scheduler.busy

    def add(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            Refused: it could never finish here; the message says why, and the other requests go on.
        """
        sequence = Sequence(self.added, request)
        self.scheduler.add(sequence)
        self.sequences[sequence.number] = sequence
        self.added += 1
        return sequence.number

    def abort(self, number: int) -> list[int]:
        """Stop a request and give back what it had so far; KeyError where none of that number is alive."""
        if number not in self.sequences:
            raise KeyError(f"no request {number} is alive, wanted one of {sorted(self.sequences)}")
        sequence = self.sequences.pop(number)
        self.scheduler.end(sequence, Status.ABORTED)
        return sequence.new_tokens

    def launch(self, step: Step | None) -> Running | None:
        """Start a planned step, if there is one."""
        return None if step is None else self.runner.launch(step)

    def step(self) -> list[Output]:
        """Start the next step and take in the one before; the tokens that came back."""
        step = self.scheduler.plan()
        before, self.under_way = self.under_way, self.launch(step)
        if step is not None:
            self.steps += 1
            self.computed += step.tokens
        if before is None:
            return []
        outputs = []
        for sequence, token in self.scheduler.complete(before.step, before.result()):
            finished = not sequence.alive
            if finished:
                del self.sequences[sequence.number]
            outputs.append(Output(sequence.number, token, finished))
        return outputs

    def generate(self, requests: list[Request], progress: Callable[[int, int], None] | None = None) -> list[list[int]]:
        """New tokens of every request, in order; others that were added before go on beside them.

        The longest go first: all are done when the last one is, and it should not be alone before that.

        Args:
            progress: called with finished requests and all of them, whenever one has finished.

        Raises:
            Refused: a request that could never finish, named by its place; nothing was started then.
        """
        self.refuse_any(requests)
        numbers = [0] * len(requests)
        for place in sorted(range(len(requests)), key=lambda place: -requests[place].max_new_tokens):
            numbers[place] = self.add(requests[place])
        waited = {number: self.sequences[number] for number in numbers}
        left = set(numbers)
        try:
            while left:
                ended = {output.number for output in self.step() if output.finished} & left
                left -= ended
                if ended and progress is not None:
                    progress(len(numbers) - len(left), len(numbers))
        finally:  # an interrupt leaves nothing behind
            for number in left & set(self.sequences):
                self.abort(number)
        return [waited[number].new_tokens for number in numbers]

    def refuse_any(self, requests: list[Request]) -> None:
        """Raises Refused for the first request that could never finish, named by its place."""
        for place, request in enumerate(requests):
            try:
                self.scheduler.refuse(request)
            except Refused as error:
                raise Refused(f"request {place}: {error}") from None

    def stream(self, request: Request) -> Iterator[int]:
        """Tokens of one request as they come; who stops listening aborts it.  Raises Refused at once."""
        return self._stream(self.add(request))

    def _stream(self, number: int) -> Iterator[int]:
        sequence, told = self.sequences[number], 0
        try:
            while sequence.alive:
                self.step()
                new = sequence.new_tokens
                yield from new[told:]
                told = len(new)
        finally:
            if number in self.sequences:
                self.abort(number)

    def check(self) -> None:
        """AssertionError where pages, rows, queues and living sequences do not add up."""
        self.scheduler.check()
        queued = {s.number for s in (*self.scheduler.running, *self.scheduler.waiting)}
        assert queued == set(self.sequences), f"queued are {sorted(queued)}, alive {sorted(self.sequences)}"
