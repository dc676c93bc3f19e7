"""What an accuracy gate sees of the catalogue of faults: each planted in a model that answers questions.

    python -m moe_harness.harness.proof.gate_matrix --model DIR --json docs/gate_matrix.json

Every fault of the stages experts and moe_block that changes values is put into all layers of transformers' model, and
into the middle one alone; right implementations beside them.  Both measures come from one forward pass over each
question with its worked answer: its log-likelihood, and whether each of its tokens is the likeliest after those before
it, which is exactly where the greedy answer is the worked one word for word.  (Such an answer is what the arithmetic
model gives; a fault that shows in decoding alone is not seen here, whichever measure.)

The accuracy sees a fault where the gate's statistics say fail, the gold log-likelihood where its mean shift is
significant (Wilcoxon's signed-rank test) and larger than NOISE times that of any right implementation, or no number.
"""

import argparse
import itertools
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_harness.harness.core import registry
from moe_harness.harness.core.catalogue import Fault, all_faults, get
from moe_harness.harness.gate.answerers import Settings
from moe_harness.harness.gate.exchange import Gold, Request
from moe_harness.harness.gate.statistics import LEVEL, Paired, Shift, verdict

NOISE = 3.0
SIGNS = ("value", "dtype", "shape")  # what changes answers; the others are for checks that look for them
LONGEST = 60  # seconds for one fault


@dataclass(frozen=True)
class Planted:
    """One thing to put into the model: a fault, or a right implementation (then `name` is its spec)."""

    kind: str  # "fault", "right"
    name: str
    stage: str
    layer: int | None


def plan(middle: int) -> list[Planted]:
    """Right implementations first, then faults in all layers, then in the middle one."""
    right = [Planted("right", "grouped_mm", "", None)]
    right += [Planted("right", name, "experts", None) for name in registry.registered("experts")]
    faults = [found for found in all_faults() if found.stage in ("experts", "moe_block") and plantable(found)]
    return [*right, *(Planted("fault", f.name, f.stage, layer) for layer in (None, middle) for f in faults)]


def plantable(fault: Fault) -> bool:
    """Whether a fault's answers mean anything: one of the experts is planted as such and not inside a block again."""
    twice = fault.part is not None and fault.part.stage == "experts"
    return fault.sign in SIGNS and not twice


def questions(count: int) -> list[Request]:
    """Problems of arithmetic without examples before them, which the model answers as well."""
    from moe_harness.fixtures.arithmetic import problems
    from moe_harness.fixtures.arithmetic.tokens import prompt

    return [
        Request("arithmetic", i, "", "", 0, prompt(problem), f" {problem.answer}", (), 1)
        for i, problem in enumerate(itertools.islice(problems("test", 0), count))
    ]


def run(settings: Settings, count: int, seconds: float, keep: Path) -> dict[str, Any]:
    """The whole matrix; what there is no time for is not in it.  `keep` is written after every fault."""
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

    model = TransformersModel("transformers:eager", settings, implementation="eager")
    asked, ends = questions(count), time.monotonic() + seconds
    trusted = model.golds(asked)
    todo, rows = plan(model.model.config.num_hidden_layers // 2), []
    signal.signal(signal.SIGALRM, _too_long)
    for planted in todo:
        if time.monotonic() > ends:
            break
        signal.alarm(LONGEST)
        try:
            measured = compared(trusted, _with(model, planted, asked))
        except Exception as error:  # whatever a fault raises is what is known of it
            measured = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        finally:
            signal.alarm(0)
        rows.append({**vars(planted), **measured})
        result = {"documents": count, "planned": len(todo), "identity": model.identity(), "noise": NOISE}
        keep.write_text(json.dumps({**result, **seen(rows), "rows": rows}, indent=1) + "\n")
    return json.loads(keep.read_text())


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no answers after {LONGEST} s")


def _with(model: Any, planted: Planted, asked: Sequence[Request]) -> list[Gold]:
    from moe_harness.harness.gate.answerers.plugging import plug

    if planted.stage == "":
        model.model.set_experts_implementation(planted.name)
        try:
            return model.golds(asked)
        finally:
            model.model.set_experts_implementation("eager")
    function = get(planted.name).function if planted.kind == "fault" else registry.find("experts", planted.name)
    take_out = plug(model.model, planted.stage, function, planted.layer)
    try:
        return model.golds(asked)
    finally:
        take_out()


def compared(trusted: Sequence[Gold], found: Sequence[Gold], margin: float = 0.02) -> dict[str, Any]:
    """One row: verdict on the accuracy, and the shift of the gold log-likelihood."""
    right = [[gold.greedy == gold.tokens for gold in golds] for golds in (trusted, found)]
    pairs = list(zip(*right, strict=True))
    counted = Paired(len(pairs), sum(b and not c for b, c in pairs), sum(c and not b for b, c in pairs))
    shifts = [c.loglikelihood - b.loglikelihood for b, c in zip(trusted, found, strict=True)]
    finite = [shift for shift in shifts if abs(shift) < float("inf")]
    shift = Shift.of(finite)
    return {
        "accuracy": [sum(side) / len(side) for side in right], "verdict": verdict(counted, margin),
        "gold": None if shift is None else shift.mean, "interval": None if shift is None else list(shift.interval),
        "p": None if shift is None else shift.p,
        "largest": None if shift is None else shift.largest, "not_finite": len(shifts) - len(finite),
    }  # fmt: skip


def seen(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Marks each row with who sees it, and counts."""
    floor = NOISE * max((abs(r["gold"]) for r in rows if r["kind"] == "right" and "error" not in r), default=0.0)
    for row in rows:
        if "error" not in row:
            significant = row["gold"] is not None and row["p"] < LEVEL and row["gold"] < -floor
            row["by_accuracy"] = row["verdict"] == "fail"
            row["by_gold"] = bool(row["not_finite"] or significant)
    counts = {}
    for place, here in (("all_layers", True), ("one_layer", False)):
        found = [r for r in rows if r["kind"] == "fault" and (r["layer"] is None) == here and "error" not in r]
        counts[place] = {
            "faults": len(found), "by_accuracy": sum(r["by_accuracy"] for r in found),
            "by_gold": sum(r["by_gold"] for r in found),
            "by_neither": sum(not (r["by_gold"] or r["by_accuracy"]) for r in found),
        }  # fmt: skip
    return {"floor": floor, "seen": counts, "raised": sum("error" in r and r["kind"] == "fault" for r in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_harness.harness.proof.gate_matrix", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3600, help="start nothing new after so long")
    asked = parser.parse_args()
    settings = Settings(asked.model, asked.device, asked.dtype)
    print(json.dumps(run(settings, asked.questions, asked.seconds, asked.json)["seen"], indent=1))


if __name__ == "__main__":
    main()
