"""What an accuracy gate sees of the catalogue of faults: each planted in a model that answers questions.

    python -m moe_harness.harness.proof.gate_matrix --model DIR --json docs/gate_matrix.json --page docs/gate_matrix.md

Every fault of the stages experts and moe_block that changes values is put into all layers of transformers' model, and
what shows there into the middle one alone; right implementations beside them.  Two measures are taken, by the gate's
own code:

    accuracy                greedy answers to the GENERATED questions with the shortest worked answers, strict match;
                            a fault is seen where the gate's statistics say fail
    gold log-likelihood     one forward pass over each question with its worked answer; a fault is seen where an answer
                            has no finite log-likelihood, where the mean falls significantly (Wilcoxon's signed-rank
                            test) and by more than NOISE times what any right implementation moves it, or where one
                            answer moves by more than NOISE times what any right implementation moves any

What a right implementation moves is measured on other questions (another seed) than those that judge.  A fault whose
numbers equal those of a right implementation in every bit is absent from the model: no statistic can see it.
"""

import argparse
import itertools
import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_harness.harness.core import registry
from moe_harness.harness.core.catalogue import Fault, all_faults, get
from moe_harness.harness.gate.answerers import Settings
from moe_harness.harness.gate.exchange import Answer, Gold, Request, digest
from moe_harness.harness.gate.judging import MARGIN
from moe_harness.harness.gate.statistics import LEVEL, Paired, Shift, verdict
from moe_harness.harness.gate.task import STRICT_PATTERN

if TYPE_CHECKING:
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

SCHEMA = 2
NOISE = 3.0
SIGNS = ("value", "dtype", "shape")  # what changes answers; the others are for checks that look for them
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


def rights(layer: int | None) -> list[Planted]:
    """Right implementations in one layer, or in all."""
    stages = ("experts", "moe_block")
    return [Planted("right", name, stage, layer) for stage in stages for name in registry.registered(stage)]


def faults() -> list[Planted]:
    """The faults, in all layers."""
    wanted = [fault for fault in all_faults() if fault.stage in ("experts", "moe_block") and plantable(fault)]
    return [Planted("fault", fault.name, fault.stage, None) for fault in wanted]


def plan(middle: int, rows: Sequence[Row]) -> Iterator[Planted]:
    """What is planted, in this order; `rows` grows meanwhile, since what equals a right implementation in all layers
    does so in one."""
    yield from (*rights(None), *rights(middle), *faults())
    shown = {row["name"] for row in rows if row["kind"] == "fault" and row["present"]}
    yield from (replace(planted, layer=middle) for planted in faults() if planted.name in shown)


def plantable(fault: Fault) -> bool:
    """Whether a fault's answers mean anything: one of the experts is planted as such and not inside a block again."""
    twice = fault.part is not None and fault.part.stage == "experts"
    return fault.sign in SIGNS and not twice


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


def run(settings: Settings, count: int, seed: int, seconds: float, keep: Path, kills: Path | None) -> dict[str, Any]:
    """The whole matrix; what there is no time for is not in it.

    `keep` is written after every fault, and the faults that it holds of a run with the same settings are not run again.
    """
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

    model = TransformersModel("transformers:eager", settings, implementation="eager")
    middle, ends = model.model.config.num_hidden_layers // 2, time.monotonic() + seconds
    bench = Bench(model, questions(count, seed))
    other = Bench(model, questions(count, seed + 1))
    known = [row for row, _ in _rows(other, rights(None), math.inf, other.trusted())]
    least = floor(known)
    trusted = bench.trusted()
    about = {
        "schema": SCHEMA, "documents": count, "generated": len(bench.short), "seed": seed, "margin": MARGIN,
        "cost": bench.cost(), "identity": model.identity(), "planned": len(faults()), "floor": least,
        "calibration": known,
    }  # fmt: skip
    rows: list[Row] = []
    done = {(row["name"], row["layer"]): row for row in kept(keep, about)}

    def todo() -> Iterator[Planted]:
        for planted in plan(middle, rows):
            row = done.pop((planted.name, planted.layer), None) if planted.kind == "fault" else None
            if row is None:
                yield planted
            else:
                rows.append(row | seen(row, least))

    right_bits, killers = {trusted.bits}, _killers(kills)
    for row, measured in _rows(bench, todo(), ends, trusted):
        if measured is not None and row["kind"] == "right":
            right_bits.add(measured.bits)
        row |= {"present": None if measured is None else measured.bits not in right_bits}
        row |= seen(row, least) | {"checks": killers.get(row["name"])}
        rows.append(row)
        whole = [*rows, *done.values()]  # what was not reached again is not lost
        keep.write_text(json.dumps({**about, "seen": counts(whole), "rows": whole}, indent=1) + "\n")
    return dict(json.loads(keep.read_text()))


def kept(file: Path, about: dict[str, Any]) -> list[Row]:
    """The faults of an interrupted run, where it asked the same of the same model; none otherwise."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text("utf-8"))
    same = all(found.get(name) == about[name] for name in ("schema", "documents", "generated", "seed", "identity"))
    return [row for row in found["rows"] if row["kind"] == "fault"] if same else []


def _rows(
    bench: Bench, plan: Iterable[Planted], ends: float, trusted: Measured
) -> Iterator[tuple[Row, Measured | None]]:
    """A row for each thing planted, with what was measured."""
    for late in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(late, _too_long)
    for planted in plan:
        if time.monotonic() > ends:
            return
        signal.setitimer(signal.ITIMER_PROF, LONGEST, LONGEST)  # again, where a fault swallows what is raised
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        try:
            measured = bench.measure(planted)
        except Exception as error:  # whatever a fault raises is what is known of it
            yield {**vars(planted), "error": f"{type(error).__name__}: {str(error)[:200]}"}, None
            continue
        finally:
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
        yield {**vars(planted), **compared(trusted, measured)}, measured


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no answers after {LONGEST} s of the processor or {WAITING} s by the clock")


def _killers(kills: Path | None) -> dict[str, list[str]]:
    """The checks that killed each fault, of a kill matrix."""
    rows = [] if kills is None else json.loads(kills.read_text("utf-8"))["rows"]
    return {row["fault"]: [c for c, cell in row["checks"].items() if cell["status"] == "killed"] for row in rows}


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


def floor(rows: Sequence[Row]) -> dict[str, float]:
    """How far right implementations move the mean and any one answer, times NOISE."""
    ran = [row for row in rows if "error" not in row]
    return {
        "mean": NOISE * max((abs(row["gold"]) for row in ran), default=0.0),
        "largest": NOISE * max((row["largest"] for row in ran), default=0.0),
    }


def seen(row: Row, least: dict[str, float]) -> Row:
    """What sees a row: the accuracy, and each way in which the gold log-likelihood can tell."""
    if "error" in row:
        return {}
    mean = row["gold"] is not None and row["p"] < LEVEL and row["gold"] < -least["mean"]
    single = row["largest"] is not None and row["largest"] > least["largest"]
    return {
        "by_accuracy": row["verdict"] == "fail", "by_mean": bool(mean), "by_single": bool(single),
        "by_gold": bool(row["not_finite"] or mean or single),
    }  # fmt: skip


def counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How many faults each measure sees, in all layers and in one, and false alarms on right implementations."""
    found = {}
    for place, everywhere in (("all_layers", True), ("one_layer", False)):
        here = [row for row in rows if (row["layer"] is None) == everywhere]
        ran = {kind: [r for r in here if r["kind"] == kind and "error" not in r] for kind in ("fault", "right")}
        faulty = ran["fault"]
        found[place] = {
            "faults": len(faulty), "present": sum(row["present"] for row in faulty),
            "raised": sum("error" in row and row["kind"] == "fault" for row in here),
            **{name: sum(row[name] for row in faulty) for name in ("by_accuracy", "by_gold", "by_mean", "by_single")},
            "by_neither": sum(not (row["by_gold"] or row["by_accuracy"]) for row in faulty),
            "by_checks": sum(bool(row["checks"]) for row in faulty),
            "right": len(ran["right"]),
            "false_alarms": sum(row["by_gold"] or row["by_accuracy"] for row in ran["right"]),
        }  # fmt: skip
    return found


def main() -> None:
    from moe_harness.harness.proof.gate_matrix_view import page

    parser = argparse.ArgumentParser(prog="python -m moe_harness.harness.proof.gate_matrix", description=__doc__)
    parser.add_argument("--model", type=Path, help="the checkpoint; without it, --json is read and only shown")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write the matrix as a Markdown page here")
    parser.add_argument("--kills", type=Path, help="a kill matrix of `faults --json`: what the kernel checks see")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the problems; the next seed's calibrate")
    parser.add_argument("--seconds", type=float, default=3600, help="start nothing new after so long")
    asked = parser.parse_args()
    if asked.model is not None:
        settings = Settings(asked.model, asked.device, asked.dtype)
        run(settings, asked.questions, asked.seed, asked.seconds, asked.json, asked.kills)
    result = json.loads(asked.json.read_text("utf-8"))
    print(json.dumps(result["seen"], indent=1))
    if asked.page is not None:
        asked.page.write_text(page(result), "utf-8")


if __name__ == "__main__":
    main()
