"""Count false alarms: right implementations judged seed after seed, for as long as is given.

    python -m moe_harness.suites.meta.false_alarms --minutes 60 --processes 2 --json found.json
    python -m moe_harness.suites.meta.false_alarms --minutes 35 --busy 8 --json found.json

A run is one implementation under the quick profile on the CPU with a seed of its own.  With n runs and no alarm the
rate is below 3 / n at 95 % confidence.

With `--busy N` the machine is kept busy by N processes a core that do nothing else, and a run is `moe-harness check`'s
own, in processes that are watched: a case of each of a few checks, others with each seed, of every right implementation
that a CPU can run, those over ranks too; every tenth is the search for more instead.  What is measured then are the
clocks: budgets, hangs, deadlocks, deadlines of the search, memory that seems to leak.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

IMPLEMENTATIONS = (
    ("experts", "torch:loop"),
    ("router", "torch:loop"),
    ("experts", "torch:grouped_mm"),
    ("grouped_linear", "torch:grouped_mm"),
    ("experts", "moe_harness.suites.meta.right.experts:round_every_stage"),
    ("shared_expert_gate", "torch:loop"),
    ("experts", "moe_harness.suites.meta.right.experts:weight_before_down"),
    ("moe_block", "torch:loop"),
    ("experts", "moe_harness.suites.meta.right.experts:running_sum_over_slots"),
    ("router", "moe_harness.suites.meta.right.router:weights_in_logit_dtype"),
)
WORLDS = (1, 2)  # of a busy machine of two cores
OF_A_RUN = 5  # cases, each of another check or number of ranks
SEARCHED = 10  # of so many runs on a busy machine one is the search
COMMAND = "python -m moe_harness.suites.meta.false_alarms"


def judge_run(stage: str, spec: str, seed: int) -> dict[str, Any]:
    """One quick run in this process: cases judged, the alarms among them, the largest share of a bound."""
    import torch

    from moe_harness.harness.core.contracts import load
    from moe_harness.harness.core.invocation import Trial
    from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, plan
    from moe_harness.harness.process.worker import judge_id

    torch.set_num_threads(1)
    trial = Trial(load(stage, spec), "cpu")
    ids = [p.id for p in plan(stage, Request(seed=seed)) if p.check not in ON_CUDA_ONLY | {"leak"}]
    answers = [judge_id(trial, case_id) for case_id in ids]
    alarms = [{"id": a.id, "told": [f.message for f in a.findings] or a.reason} for a in answers
              if a.status in ("failed", "error")]  # fmt: skip
    elements = sum(a.record.elements for a in answers)
    return {"alarms": alarms, "cases": len(ids), "elements": elements, "worst": max(a.record.worst for a in answers)}


# -------------------------------------------------------------------------------------------------- on a busy machine


def right() -> list[tuple[str, str, tuple[int, ...]]]:
    """(stage, spec, worlds) of what is right: strangers' functions, those of this tree, and what runs over ranks."""
    from moe_harness.suites.dispatcher.false_alarms import DISPATCHERS, LINEARS, REDUCTIONS
    from moe_harness.suites.meta.judging import functions_of

    own = [("experts", "torch:batched"), ("quantized_experts", "torch:dequantized"), ("router", "torch:topk"),
           ("paged_attention", "torch"), ("rms_norm", "torch"), ("rope_cache", "torch"), ("sampler", "torch"),
           ("shared_expert_gate", "torch:expression"), ("model", "qwen3_moe")]  # fmt: skip
    linears = [("parallel_linear", spec) for specs in LINEARS.values() for spec in specs]
    over_ranks = [*(("dispatcher", spec) for spec in DISPATCHERS), *(("reduction", spec) for spec in REDUCTIONS)]
    alone = dict.fromkeys([*IMPLEMENTATIONS, *own, *functions_of("right")])
    return [
        *((stage, spec, ()) for stage, spec in alone),
        *((stage, spec, WORLDS) for stage, spec in [*over_ranks, *linears, ("model", "qwen3_moe")]),
    ]


def sampled(stage: str, spec: str, worlds: tuple[int, ...], seed: int) -> tuple[str, ...]:
    """Ids of a few cases, each of another check or number of ranks, drawn with the seed."""
    from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, plan
    from moe_harness.harness.core.ranked_stage import plan_over_ranks
    from moe_harness.harness.ranks.judge import traits_of

    if worlds:
        planned = list(plan_over_ranks(stage, worlds, seed=seed, **traits_of(stage, spec)))
    else:
        planned = [p for p in plan(stage, Request(seed=seed)) if p.check not in ON_CUDA_ONLY]
    drawn = Random(f"{stage} {seed}")
    drawn.shuffle(planned)
    one_of_each = {(p.check, getattr(p.case, "R", 1)): p.id for p in planned}
    return tuple(drawn.sample(list(one_of_each.values()), min(OF_A_RUN, len(one_of_each))))


def judge_busy(stage: str, spec: str, worlds: tuple[int, ...], seed: int, *, search: bool = False) -> dict[str, Any]:
    """One run as the command makes it, of a few cases or of what the search draws."""
    from moe_harness.harness.core.plan import Request
    from moe_harness.harness.run.session import RunOptions, judge

    options = RunOptions(checks=("property",)) if search else RunOptions(cases=sampled(stage, spec, worlds, seed))
    result = judge(stage, spec, Request(seed=seed), options, worlds=worlds)
    alarms = [{"id": f["case"], "impl": spec, "told": f["message"]} for f in result["failures"]]
    if result["error"]:
        alarms.append({"id": f"{stage}, seed {seed}", "impl": spec, "told": result["error"]})
    return {"alarms": alarms, "cases": result["coverage"]["executed"]}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure_busy(minutes: float, a_core: int, first_seed: int, path: Path | None) -> dict[str, Any]:
    """Judge every right implementation in turn, again and again, on a busy machine."""
    cores = len(os.sched_getaffinity(0))
    everything, start = right(), time.monotonic()
    runs: Counter[str] = Counter()
    found: dict[str, Any] = {"torch": f"{version('torch')}, {cores} cores, {a_core} busy processes a core",
                             "command": f"{COMMAND} --busy {a_core} --minutes {minutes:g}", "alarms": []}  # fmt: skip
    judged = Counter[str]()
    with busy(a_core * cores):
        for number in count():
            if time.monotonic() - start > 60 * minutes:
                break
            # With a stride, so that one that is broken off has seen all stages.
            stage, spec, worlds = everything[number * 37 % len(everything)]
            searched = number % SEARCHED == SEARCHED - 1
            result = judge_busy(stage, spec, worlds, first_seed + number, search=searched)
            runs[f"{stage} {spec} {worlds}"] += 1
            judged.update({"runs": 1, "searches": searched, "cases": result["cases"], "over ranks": bool(worlds)})
            found["alarms"] += result["alarms"]
            found |= {**judged, "implementations": len(runs), "fewest of one": min(runs.values()),
                      "minutes": round((time.monotonic() - start) / 60, 1), "load": os.getloadavg()[1]}  # fmt: skip
            if path is not None:
                path.write_text(json.dumps(found, indent=1) + "\n")
    return found


# --------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, help="processes a core that keep the machine busy")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.busy:
        print(json.dumps(measure_busy(given.minutes, given.busy, given.first_seed, given.json), indent=1))
        return
    end = time.monotonic() + 60 * given.minutes
    total: dict[str, Any] = {"runs": 0, "cases": 0, "elements": 0, "worst": 0.0, "alarms": []}
    work = ((stage, spec, seed) for seed in count(given.first_seed) for stage, spec in IMPLEMENTATIONS)
    with ProcessPoolExecutor(given.processes) as pool:
        pending = {pool.submit(judge_run, *next(work)) for _ in range(2 * given.processes)}
        while pending:
            done = pending.pop()
            result = done.result()
            if time.monotonic() < end:
                pending.add(pool.submit(judge_run, *next(work)))
            total["runs"] += 1
            total["worst"] = max(total["worst"], result["worst"])
            total["alarms"] += result["alarms"]
            for key in ("cases", "elements"):
                total[key] += result[key]
            total["rate_below"] = round((3 + 2 * len(total["alarms"])) / total["runs"], 5)
            if given.json is not None:
                given.json.write_text(json.dumps({"command": COMMAND, **total}, indent=1))
    print(json.dumps(total, indent=1))


if __name__ == "__main__":
    main()
