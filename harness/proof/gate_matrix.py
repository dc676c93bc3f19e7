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
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

from moe_harness.harness.core import registry
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.gate.answerers import Settings
from moe_harness.harness.gate.judging import MARGIN
from moe_harness.harness.gate.statistics import LEVEL, Paired, verdict
from moe_harness.harness.proof.gate_matrix_bench import MeasureAll, Planted, Questions, Row, about, shared_among

SCHEMA = 2
NOISE = 3.0
STEPS = {
    stage: f"moe_harness.harness.stages.{stage}.faults._steps:run" for stage in ("experts", "moe_block")
}  # what a fault gives that this model does not show
SIGNS = ("value", "dtype", "shape")  # what changes answers; the others are for checks that look for them


def rights(layer: int | None) -> list[Planted]:
    """Right implementations in one layer, or in all; the steps that faults are made of, without a fault, among them."""
    named = [(stage, name) for stage in STEPS for name in (*registry.registered(stage), STEPS[stage])]
    return [Planted("right", name, stage, layer) for stage, name in named]


def faults() -> list[Planted]:
    """The faults, in all layers."""
    wanted = [fault for fault in all_faults() if fault.stage in ("experts", "moe_block") and plantable(fault)]
    return [Planted("fault", fault.name, fault.stage, None) for fault in wanted]


def parts(middle: int, rows: Sequence[Row]) -> Iterator[list[Planted]]:
    """What is planted, part after part; `rows` grows meanwhile, since what equals a right implementation in all layers
    does so in one."""
    yield [*rights(None), *rights(middle)]
    yield faults()
    shown = {row["name"] for row in rows if row["kind"] == "fault" and row["present"]}
    yield [replace(planted, layer=middle) for planted in faults() if planted.name in shown]


def plantable(fault: Fault) -> bool:
    """Whether a fault's answers mean anything: one of the experts is planted as such and not inside a block again."""
    twice = fault.part is not None and fault.part.stage == "experts"
    return fault.sign in SIGNS and not twice


def run(asked: Questions, seconds: float, keep: Path, kills: Path | None, measured: MeasureAll) -> dict[str, Any]:
    """The whole matrix; what there is no time for is not in it.

    `keep` is written after every fault, and the faults that it holds of a run with the same settings are not run again.
    """
    ends = time.monotonic() + seconds
    told, trusted, layers = about(asked)
    known = [row for row, _ in measured(asked.calibrating, rights(None))]
    least = floor(known)
    whole = {
        "schema": SCHEMA, "documents": asked.count, "seed": asked.seed, "margin": MARGIN, "planned": len(faults()),
        **told, "floor": least, "calibration": known,
    }  # fmt: skip
    rows: list[Row] = []
    done = {(row["name"], row["layer"]): row for row in kept(keep, whole)}
    right_bits, killers = {trusted}, _killers(kills)
    for part in parts(layers // 2, rows):
        again = [(p.name, p.layer) for p in part if p.kind == "fault" and (p.name, p.layer) in done]
        rows += [row | seen(row, least) | {"checks": killers.get(row["name"])} for row in map(done.pop, again)]
        left = [p for p in part if p.kind == "right" or (p.name, p.layer) not in again]
        for row, bits in measured(asked, left, ends):
            if bits is not None and row["kind"] == "right":
                right_bits.add(bits)
            row |= {"present": None if bits is None else bits not in right_bits}
            row |= seen(row, least) | {"checks": killers.get(row["name"])}
            rows.append(row)
            found = [*rows, *done.values()]  # what was not reached again is not lost
            keep.write_text(json.dumps({**whole, "seen": counts(found), "rows": found}, indent=1) + "\n")
    return dict(json.loads(keep.read_text()))


def kept(file: Path, about: dict[str, Any]) -> list[Row]:
    """The faults of an interrupted run, where it asked the same of the same model; none otherwise."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text("utf-8"))
    same = all(found.get(name) == about[name] for name in ("schema", "documents", "generated", "seed", "identity"))
    return [row for row in found["rows"] if row["kind"] == "fault"] if same else []


def _killers(kills: Path | None) -> dict[str, list[str]]:
    """The checks that killed each fault, of a kill matrix."""
    rows = [] if kills is None else json.loads(kills.read_text("utf-8"))["rows"]
    return {row["fault"]: [c for c, cell in row["checks"].items() if cell["status"] == "killed"] for row in rows}


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


def expected_by_accuracy(rows: Sequence[Row], drawn: int, generated: int) -> float:
    """How many faults the accuracy would see with `drawn` of its `generated` questions: the mean over all draws."""
    lost_and_won: list[tuple[int, int]] = [row["discordant"] for row in rows]
    return sum(_seen_in(lost, won, drawn, generated) for lost, won in lost_and_won)


def _seen_in(worse: int, better: int, drawn: int, generated: int) -> float:
    """The share of draws of which the gate says fail: b of those lost and c of those won, hypergeometric."""
    rest = generated - worse - better
    return sum(
        comb(worse, b) * comb(better, c) * comb(rest, drawn - b - c) / comb(generated, drawn)
        for b in range(min(worse, drawn) + 1)
        for c in range(min(better, drawn - b) + 1)
        if drawn - b - c <= rest and verdict(Paired(drawn, b, c), MARGIN) == "fail"
    )


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
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the faults, one thread each")
    parser.add_argument("--seconds", type=float, default=3600, help="start nothing new after so long")
    asked = parser.parse_args()
    if asked.model is not None:
        settings = Settings(asked.model, asked.device, asked.dtype)
        what = Questions(settings, asked.questions, asked.seed)
        with shared_among(asked.jobs) as measured:
            run(what, asked.seconds, asked.json, asked.kills, measured)
    result = json.loads(asked.json.read_text("utf-8"))
    print(json.dumps(result["seen"], indent=1))
    if asked.page is not None:
        asked.page.write_text(page(result), "utf-8")


if __name__ == "__main__":
    main()
