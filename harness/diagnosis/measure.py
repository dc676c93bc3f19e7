"""How often the diagnosis is right: every fault of the catalogue, hidden behind another implementation's rounding.

    python -m moe_harness.harness.diagnosis.measure --json docs/diagnosis.json

Each fault is judged like an implementation, case after case in the order of a quick run; the first failing case is
handed to `explain`, as the worker does.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_harness.harness.checks import CHECKS
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault
from moe_harness.harness.core.contracts import DTYPES, Declarations, Subject
from moe_harness.harness.core.errors import HarnessError
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.core.registry import stages_with
from moe_harness.harness.diagnosis.candidates import DEADLY, forget, suspects
from moe_harness.harness.diagnosis.datasets import probes
from moe_harness.harness.diagnosis.disguise import hidden
from moe_harness.harness.diagnosis.search import SECONDS, explain

STAGES = stages_with("datasets")
SKIPPED = ("leak", "determinism", "batch_invariance", "graph_replay", "side_stream", "large_offsets")

# Faults that are one function of the data, under every input the contract allows: the name of either is right.
# Memory that holds NaN or huge integers leaves no count that fits: nothing is computed, and the output is all zeros.
EQUAL: tuple[frozenset[str], ...] = (
    frozenset({"counts_in_uninitialised_memory", "all_zeros"}),
    frozenset({"counts_in_uninitialised_memory_in_block", "all_zeros"}),
    frozenset({"gate_dropped", "input_copied"}),  # the shared expert's output as it was given
)


def measured(stage: str) -> list[Fault]:
    """The faults of a stage on which the diagnosis is measured."""
    return [fault for fault in suspects(stage, "cpu") if fault.family not in DEADLY]


def trial_of(fault: Fault) -> Trial:
    """The hidden fault, which declares of its stage alone what the fault does."""
    function, own = hidden(fault), Declarations.of(fault.function, fault.stage).extra
    return Trial(Subject(fault.stage, fault.spec, function, replace(Declarations.of(function), extra=own), None), "cpu")


def first_failure(trial: Trial) -> tuple[str, Case] | None:
    """(check, case) that a quick run sees fail first; where it sees none, one of the probes."""
    dtypes = tuple(d for d in DTYPES if d in trial.subject.declared.dtypes)
    planned = plan(trial.subject.stage, Request(dtypes=dtypes))
    for check, case in [*planned, *(("numeric", scene.cases[0]) for scene in probes(planned[0].case))]:
        if check in SKIPPED:
            continue
        try:
            if CHECKS[check](trial, case).findings:
                return check, case
        except (Rejected, HarnessError):
            continue
        except Broken:
            return check, case
    return None


def measure(fault: Fault, seconds: float = SECONDS) -> dict[str, Any]:
    """What is told about one hidden fault."""
    if fault.stateful:
        forget(fault)
    trial = trial_of(fault)
    found = first_failure(trial)
    if found is None:
        return {"fault": fault.name, "stage": fault.stage, "failed": None, "told": [], "seconds": 0.0, "place": None}
    check, case = found
    started = time.process_time()
    told = [entry["fault"] for entry in explain(trial, case, seconds)]
    seconds = round(time.process_time() - started, 2)
    names = next((group for group in EQUAL if fault.name in group), frozenset({fault.name}))
    place = next((number for number, name in enumerate(told, 1) if name in names), None)
    return {
        "fault": fault.name,
        "stage": fault.stage,
        "failed": f"{fault.stage}/{check}/{case.id()}",
        "told": told,
        "seconds": seconds,
        "place": place,
    }


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shares over the faults that a quick run sees."""
    rows = [row for row in rows if row["failed"]]
    first = sum(row["place"] == 1 for row in rows)
    three = sum(row["place"] is not None for row in rows)
    longest = max((row["seconds"] for row in rows), default=0.0)
    return {"faults": len(rows), "first": first, "among_three": three, "longest_seconds": longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--fault", action="append")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time of one diagnosis (figures are CPU seconds)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for stage in options.stage or STAGES:
        for fault in measured(stage):
            if options.fault and fault.name not in options.fault:
                continue
            rows.append(measure(fault, options.seconds))
            if rows[-1]["place"] != 1:
                print(rows[-1], flush=True)
    print(summary(rows))
    if options.json:
        by_stage = {stage: summary(r for r in rows if r["stage"] == stage) for stage in STAGES}
        result = {
            "command": "python -m moe_harness.harness.diagnosis.measure "
            f"--seconds {options.seconds:g} --json docs/diagnosis.json",
            "all": summary(rows),
            "stages": by_stage,
            "equal": [sorted(group) for group in EQUAL],
            "faults": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
