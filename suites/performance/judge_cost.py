"""What judging costs: cases per second, where the time goes, and the bound beside the reference alone.

    python -m moe_harness.suites.performance.judge_cost [--json FILE]

A benchmark, not a test: it prints ratios measured in one run, since machines are noisy.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_harness.harness.core.contracts import STAGES, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, plan
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.experts.stage import STAGE
from moe_harness.reference.experts import experts as reference

SHAPES = (
    ExpertsCase(T=64, H=1024, I=256, E=16, k=4, dtype="bf16"),
    ExpertsCase(T=16, H=2048, I=768, E=16, k=4, dtype="bf16"),
    ExpertsCase(T=256, H=512, I=512, E=8, k=2),
)


def median_seconds(call: Callable[[], Any], repetitions: int = 5) -> float:
    """Median wall time of one call, after a first one that is not counted."""
    call()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def bound_over_reference(case: ExpertsCase) -> dict[str, Any]:
    """The time of value and bound together, over that of the fp64 reference alone."""
    call = STAGE.build(case, "cpu")
    hidden, *others = call.args.values()
    alone = median_seconds(lambda: reference(hidden.double(), *others, **call.keywords))
    both = median_seconds(lambda: STAGE.expect(call, None))
    return {"case": case.id(), "reference_ms": round(alone * 1e3, 1), "ratio": round(both / alone, 2)}


def cost_of_stage(name: str, spec: str) -> dict[str, Any]:
    """Cases per second of the quick profile in one process, and each check's share of the time."""
    trial = Trial(load(name, spec), "cpu")
    ids = [p for p in plan(name, Request()) if p.check not in ON_CUDA_ONLY]
    seconds: dict[str, float] = defaultdict(float)
    for planned in ids:
        seconds[planned.check] += judge_id(trial, planned.id).seconds
    total = sum(seconds.values())
    shares = {check: round(spent / total, 3) for check, spent in sorted(seconds.items(), key=lambda item: -item[1])}
    return {
        "stage": name,
        "impl": spec,
        "cases": len(ids),
        "cases_per_second": round(len(ids) / total, 1),
        "share": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    file = parser.parse_args().json
    torch.set_num_threads(1)
    result = {
        "command": "python -m moe_harness.suites.performance.judge_cost",
        "torch": torch.__version__,
        "bound_over_reference": [bound_over_reference(case) for case in SHAPES],
        "stages": [cost_of_stage(name, "torch:loop") for name in STAGES],
    }
    print(json.dumps(result, indent=1))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
