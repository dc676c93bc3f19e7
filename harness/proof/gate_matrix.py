"""What an accuracy gate sees of the catalogue of faults: each planted in a model that answers questions.

    python -m moe_harness.harness.proof.gate_matrix answer REQUESTS OUT --model DIR --device cuda --workers 8
    python -m moe_harness.harness.proof.gate_matrix judge REQUESTS OUT --json docs/gate_matrix.json

Every fault of the stages experts and moe_block that changes values is put into all layers of transformers' model, and
into the middle one alone; right implementations beside them.  `answer` needs the model and no lm-eval, `judge` lm-eval
and no model.  A fault is seen by the accuracy where the gate's verdict is fail, by the gold log-likelihood where its
mean shift is significant and larger than NOISE times the largest of any right implementation.
"""

import argparse
import gzip
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_harness.harness.core import contracts
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.gate import exchange, task
from moe_harness.harness.gate.answerers import Settings
from moe_harness.harness.gate.exchange import Answer, Request

NOISE = 3.0
SIGNS = ("value", "dtype", "shape")  # what changes answers; the others are for checks that look for them
LONGEST = 60  # seconds for one fault
BASELINE = "transformers:eager"


@dataclass(frozen=True)
class Planted:
    """One thing to put into the model: a fault, or a right implementation (then `fault` is its spec)."""

    kind: str  # "fault", "right"
    name: str
    stage: str
    layer: int | None


def plan(middle: int, stages: Sequence[str] = ("experts", "moe_block")) -> list[Planted]:
    """Right implementations first, then faults in all layers, then in the middle one."""
    right = [Planted("right", name, "", None) for name in ("transformers:grouped_mm", "transformers:batched_mm")]
    right += [Planted("right", name, "experts", None) for name in contracts.registered("experts")
              if not name.startswith("transformers")]  # fmt: skip
    faults = [found for found in all_faults() if found.stage in stages and plantable(found)]
    return [*right, *(Planted("fault", f.name, f.stage, layer) for layer in (None, middle) for f in faults)]


def plantable(fault: Fault) -> bool:
    """Whether a fault's answers mean anything: one of the experts is planted as such and not inside a block again."""
    twice = fault.part is not None and fault.part.stage == "experts"
    return fault.sign in SIGNS and not twice


def answer(requests: Path, out: Path, settings: Settings, workers: int, seconds: float, limit: int | None) -> None:
    """Answer everything of the plan that time allows; a worker that dies is started again behind what killed it."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(str(settings.model)).num_hidden_layers
    todo, ends = plan(layers // 2)[:limit], time.time() + seconds
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    parts = [todo[first::workers] for first in range(workers)]
    running = {i: _start(context, requests, out, i, part, settings, ends) for i, part in enumerate(parts)}
    while running:
        for i, process in list(running.items()):
            process.join(0.2)
            if process.exitcode is None:
                continue
            done = len(list(_lines(out / f"part{i}.jsonl.gz")))
            if process.exitcode and done < len(parts[i]) and time.time() < ends:
                _write(out, i, {**asdict(parts[i][done]), "error": f"the process ended with {process.exitcode}"})
                running[i] = _start(context, requests, out, i, parts[i][done + 1 :], settings, ends)
                parts[i] = parts[i][: done + 1] + parts[i][done + 1 :]
            else:
                del running[i]


def _start(
    context: Any, requests: Path, out: Path, i: int, part: list[Planted], settings: Settings, ends: float
) -> Any:
    process = context.Process(target=_work, args=(requests, out, i, part, settings, ends))
    process.start()
    return process


def _work(requests: Path, out: Path, i: int, part: list[Planted], settings: Settings, ends: float) -> None:
    """One worker: the baseline first (worker 0), then its part of the plan."""
    import torch

    torch.set_num_threads(1)
    from moe_harness.harness.gate.answerers.transformers_model import TransformersModel

    asked = exchange.read_requests(requests)[1]
    model = TransformersModel(BASELINE, settings, implementation="eager")
    if i == 0 and not (out / "baseline.jsonl").exists():
        exchange.write(out / "baseline.jsonl", "gate-answers", {"identity": model.identity()}, model.answer(asked))
    signal.signal(signal.SIGALRM, _too_long)
    for planted in part:
        if time.time() > ends:
            return
        started = time.monotonic()
        signal.alarm(LONGEST)
        try:
            row: dict[str, Any] = {"answers": [_short(a) for a in _planted_answers(model, planted, asked)]}
        except Exception as error:  # whatever a fault raises is what is known of it
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        finally:
            signal.alarm(0)
        _write(out, i, {**asdict(planted), **row, "seconds": round(time.monotonic() - started, 2)})
        if "CUDA error" in row.get("error", ""):
            raise SystemExit(1)  # nothing can be computed in this process any more


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no answers after {LONGEST} s")


def _planted_answers(model: Any, planted: Planted, asked: list[Request]) -> list[Answer]:
    from moe_harness.harness.core.catalogue import get
    from moe_harness.harness.gate.answerers.plugging import plug

    if planted.stage == "":
        model.model.set_experts_implementation(planted.name.partition(":")[2])
        try:
            return model.answer(asked)
        finally:
            model.model.set_experts_implementation("eager")
    function = get(planted.name).function if planted.kind == "fault" else contracts.find("experts", planted.name)
    take_out = plug(model.model, planted.stage, function, planted.layer)
    try:
        return model.answer(asked)
    finally:
        take_out()


def _short(answer: Answer) -> dict[str, Any]:
    """Without the neighbours of each gold token, which would be most of the file."""
    gold = answer.gold
    kept = None if gold is None else {"loglikelihood": gold.loglikelihood, "tokens": [], "greedy": [], "likeliest": []}
    return {**asdict(answer), "gold": kept}


def _write(out: Path, i: int, row: dict[str, Any]) -> None:
    with gzip.open(out / f"part{i}.jsonl.gz", "at") as file:
        file.write(json.dumps(row) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with gzip.open(path, "rt") as file:
            yield from map(json.loads, file)


def judge(requests: Path, out: Path, margin: float) -> dict[str, Any]:
    """The table: a row per fault and place, with what each of the two measures sees."""
    from moe_harness.harness.gate.judging import Side
    from moe_harness.harness.gate.judging import judge as judged

    about, asked = exchange.read_requests(requests)
    asked_for = task.Asked(**about["asked"])
    rows_of: dict[tuple[str, ...], list[task.Row]] = {}

    def side(spec: str, answers: dict[str, Answer]) -> Side:
        texts = tuple(answers[request.key].text for request in asked)
        if texts not in rows_of:
            rows_of[texts] = task.score(asked_for, asked, answers)
        keys = {request.doc_id: request.key for request in asked}
        return Side(spec, [task.Row(r.doc_id, r.doc_hash, r.prompt_hash, r.right, r.valid, answers[keys[r.doc_id]])
                           for r in rows_of[texts]])  # fmt: skip

    identity, baseline = exchange.read_answers(out / "baseline.jsonl")
    trusted, found = side(BASELINE, baseline), []
    for line in (line for part in sorted(out.glob("part*.jsonl.gz")) for line in _lines(part)):
        row = {name: line[name] for name in ("kind", "name", "stage", "layer")}
        if "error" in line:
            found.append({**row, "error": line["error"]})
            continue
        answers = {a.key: a for a in map(Answer.of, line["answers"])}
        result = judged(asked_for.task, asked_for.gated, trusted, side(line["name"], answers), margin)
        gold = result["gold_loglikelihood"]
        found.append({
            **row, "verdict": result["verdict"], "accuracy": result["accuracy"]["candidate"],
            "gold": gold["difference"], "interval": gold["interval"], "not_finite": gold["not_finite"],
            "answers_changed": result["flips"]["answers"],
        })  # fmt: skip
    return {"documents": len(asked), "identity": identity["identity"], "margin": margin, "noise": NOISE,
            **seen(found), "rows": found}  # fmt: skip


def seen(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Marks each row with who sees it, and counts."""
    shifts = [abs(row["gold"]) for row in rows if row["kind"] == "right" and row.get("gold") is not None]
    floor = NOISE * max(shifts, default=0.0)
    for row in rows:
        if "error" in row:
            continue
        lost = row["not_finite"] or row["gold"] is None
        row["by_accuracy"] = row["verdict"] == "fail"
        row["by_gold"] = bool(lost or (row["interval"][1] < 0 and row["gold"] < -floor))
    counts = {}
    for place in ("all", "one"):
        here = [
            r for r in rows if r["kind"] == "fault" and (r["layer"] is None) == (place == "all") and "error" not in r
        ]
        counts[place] = {
            "faults": len(here), "by_accuracy": sum(r["by_accuracy"] for r in here),
            "by_gold": sum(r["by_gold"] for r in here),
            "by_neither": sum(not (r["by_gold"] or r["by_accuracy"]) for r in here),
        }  # fmt: skip
    return {"floor": floor, "seen": counts, "raised": sum("error" in row for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe_harness.harness.proof.gate_matrix", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    answering = steps.add_parser("answer")
    answering.add_argument("--model", type=Path, required=True)
    answering.add_argument("--device", default="cpu")
    answering.add_argument("--dtype", default="bf16")
    answering.add_argument("--batch-size", type=int, default=256)
    answering.add_argument("--workers", type=int, default=1)
    answering.add_argument("--seconds", type=float, default=3600, help="start nothing new after so long")
    answering.add_argument("--first", type=int, help="only so many of the plan")
    judging = steps.add_parser("judge")
    judging.add_argument("--margin", type=float, default=0.02)
    judging.add_argument("--json", type=Path, required=True)
    for step in (answering, judging):
        step.add_argument("requests", type=Path)
        step.add_argument("out", type=Path)
    asked = parser.parse_args()
    if asked.step == "answer":
        settings = Settings(asked.model, asked.device, asked.dtype, asked.batch_size)
        answer(asked.requests, asked.out, settings, asked.workers, asked.seconds, asked.first)
    else:
        result = judge(asked.requests, asked.out, asked.margin)
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["seen"], indent=1))


if __name__ == "__main__":
    main()
