"""Count false alarms: quick runs of right implementations, seed after seed, for as long as is given.

    python -m moe_harness.suites.meta.false_alarms --minutes 60 --processes 2 --json docs/false_alarms.json

A run is one implementation under the quick profile on the CPU with a seed of its own.  With n runs and no alarm the
rate is below 3 / n at 95 % confidence.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
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
                command = "python -m moe_harness.suites.meta.false_alarms"
                given.json.write_text(json.dumps({"command": command, **total}, indent=1))
    print(json.dumps(total, indent=1))


if __name__ == "__main__":
    main()
