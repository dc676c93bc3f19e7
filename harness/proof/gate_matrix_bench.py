"""The model of the gate's matrix with its questions: what is planted is measured in it and taken out again.

A process loads the model once and keeps it, so that several of them can share the faults among them.
"""

import contextlib
import functools
import itertools
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Protocol

from moe_harness.harness.core import registry
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.gate.answerers import Settings
from moe_harness.harness.gate.exchange import Answer, Gold, Request, digest
from moe_harness.harness.gate.judging import MARGIN
from moe_harness.harness.gate.statistics import Paired, Shift, verdict
from moe_harness.harness.gate.task import STRICT_PATTERN

if TYPE_CHECKING:
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

LONGEST = 8  # seconds of the processor for one fault
WAITING = 40 * LONGEST  # seconds by the clock
GENERATED = 12  # questions that are answered by generation; five lost ones are significant
SPARE = 8  # tokens that an answer may be longer than the worked one

Row = dict[str, Any]


@dataclass(frozen=True)
class Planted:
    """One thing to put into the model: a fault, or a right implementation (then `name` is its spec)."""

    kind: str  # "fault", "right"
    name: str
    stage: str
    layer: int | None


@dataclass(frozen=True)
class Measured:
    """The golds of all questions, and whether each of the generated answers is right."""

    golds: Sequence[Gold]
    right: Sequence[bool]
    texts: Sequence[str]

    @property
    def bits(self) -> str:
        """The same where every number is the same."""
        return digest([[gold.loglikelihood.hex() for gold in self.golds], list(self.texts)])


@dataclass(frozen=True)
class Questions:
    """Which model is asked what: `count` problems of `seed`, or of the next seed to calibrate."""

    settings: Settings
    count: int
    seed: int

    @property
    def calibrating(self) -> "Questions":
        return replace(self, seed=self.seed + 1)


def questions(count: int, seed: int) -> list[Request]:
    """Problems of arithmetic without examples before them, which the model answers as well."""
    from moe_harness.fixtures.arithmetic import problems
    from moe_harness.fixtures.arithmetic.tokens import prompt

    return [
        Request("arithmetic", i, "", "", 0, prompt(problem), f" {problem.answer}", ("Question:",), 1)
        for i, problem in enumerate(itertools.islice(problems("test", seed), count))
    ]


class Bench:
    """The model with its questions; what is planted is measured in it and taken out again."""

    def __init__(self, model: "TransformersModel", asked: Sequence[Request]):
        self.model, self.asked = model, asked
        lengths = {request.doc_id: len(model.tokens.encode(request.gold)) for request in asked}
        shortest = sorted(asked, key=lambda request: (lengths[request.doc_id], request.doc_id))[:GENERATED]
        self.short = [replace(request, max_new_tokens=lengths[request.doc_id] + SPARE) for request in shortest]

    def measure(self, planted: Planted) -> Measured:
        """Both measures of one thing; whatever it raises."""
        from moe_harness.harness.gate.answerers.plugging import plug

        function = get(planted.name).function if planted.kind == "fault" else registry.find(planted.stage, planted.name)
        take_out = plug(self.model.model, planted.stage, function, planted.layer)
        try:
            return Measured(self.golds(), *self.answers())
        finally:
            take_out()

    def trusted(self) -> Measured:
        """The model as it is."""
        return Measured(self.golds(), *self.answers())

    def golds(self) -> list[Gold]:
        return self.model.golds(self.asked)

    def answers(self) -> tuple[list[bool], list[str]]:
        """Whether each generated answer is right, and the answers."""
        tokens = self.model.tokens
        new = self.model.generate([tokens.prompt(request) for request in self.short], self.short)
        found: list[Answer] = [tokens.answer(r, ids, None) for r, ids in zip(self.short, new, strict=True)]
        right = [_number(a.text) == _number(r.gold) for a, r in zip(found, self.short, strict=True)]
        return right, [answer.text for answer in found]

    def cost(self) -> dict[str, float]:
        """Seconds of the processor for one question, of either measure."""
        found = {}
        parts: tuple[tuple[str, Callable[[], Any], int], ...] = (
            ("forced", self.golds, len(self.asked)), ("generated", self.answers, len(self.short)),
        )  # fmt: skip
        for name, measure, count in parts:
            started = time.process_time()
            measure()
            found[name] = (time.process_time() - started) / count
        return found


def _number(text: str) -> str | None:
    """What lm-eval's strict match finds in an answer."""
    found = re.search(STRICT_PATTERN, text)
    return None if found is None else found[1].replace(",", "").removesuffix(".")


@functools.cache
def _model(settings: Settings) -> "TransformersModel":
    import torch

    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

    torch.set_num_threads(1)  # the same bits, however many processes share the processor
    return TransformersModel("transformers:eager", settings, implementation="eager")


@functools.cache
def _bench(asked: Questions) -> tuple[Bench, Measured]:
    """The bench of these questions in this process, and what the model without anything planted gives."""
    bench = Bench(_model(asked.settings), questions(asked.count, asked.seed))
    return bench, bench.trusted()


def about(asked: Questions) -> tuple[dict[str, Any], str, int]:
    """What is told of a run beside its rows; the bits of the model as it is; how many layers it has."""
    bench, trusted = _bench(asked)
    model = bench.model
    told = {"generated": len(bench.short), "cost": bench.cost(), "identity": model.identity()}
    return told, trusted.bits, model.model.config.num_hidden_layers


def measure(asked: Questions, planted: Planted) -> tuple[Row, str | None]:
    """A row for what is planted, and the bits of its numbers; None where it raised."""
    bench, trusted = _bench(asked)
    for late in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(late, _too_long)
    signal.setitimer(signal.ITIMER_PROF, LONGEST, LONGEST)  # again, where a fault swallows what is raised
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        found = bench.measure(planted)
    except Exception as error:  # whatever a fault raises is what is known of it
        return {**vars(planted), "error": f"{type(error).__name__}: {str(error)[:200]}"}, None
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
    return {**vars(planted), **compared(trusted, found)}, found.bits


class MeasureAll(Protocol):
    """`measure` of each thing planted, in their order; none is started once the monotonic clock is at `ends`."""

    def __call__(
        self, asked: Questions, planted: Sequence[Planted], ends: float = math.inf
    ) -> Iterator[tuple[Row, str | None]]: ...


@contextlib.contextmanager
def shared_among(jobs: int) -> Iterator[MeasureAll]:
    """The faults shared among so many processes; this one does it where it is one."""
    context = contextlib.nullcontext() if jobs == 1 else ProcessPoolExecutor(jobs, get_context("spawn"))
    with context as processes:
        each = map if processes is None else processes.map

        def measured(
            asked: Questions, planted: Sequence[Planted], ends: float = math.inf
        ) -> Iterator[tuple[Row, str | None]]:
            for found in each(functools.partial(measure, asked), planted):
                yield found
                if time.monotonic() > ends:  # what waits is cancelled with the iterator
                    return

        yield measured


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no answers after {LONGEST} s of the processor or {WAITING} s by the clock")


def compared(trusted: Measured, found: Measured) -> Row:
    """One row: verdict on the accuracy, and the shift of the gold log-likelihood."""
    pairs = list(zip(trusted.right, found.right, strict=True))
    counted = Paired(len(pairs), sum(b and not c for b, c in pairs), sum(c and not b for b, c in pairs))
    shifts = [c.loglikelihood - b.loglikelihood for b, c in zip(trusted.golds, found.golds, strict=True)]
    finite = [shift for shift in shifts if math.isfinite(shift)]
    shift = Shift.of(finite)
    return {
        "accuracy": sum(found.right) / len(pairs), "discordant": [counted.worse, counted.better],
        "verdict": verdict(counted, MARGIN),
        "gold": None if shift is None else shift.mean, "interval": None if shift is None else list(shift.interval),
        "p": None if shift is None else shift.p, "largest": None if shift is None else shift.largest,
        "not_finite": len(shifts) - len(finite),
    }  # fmt: skip
