"""Why a dispatcher or a sharded layer is wrong: the fault of the catalogue with the very same results on every rank.

The data of these stages are exact, so a fault is recognised by its bits, whoever computes it; no distance is measured.
It has to equal the implementation on the failing case and on another one that the implementation fails.  Imports no
torch: everything runs on the ranks.
"""

import time
from collections.abc import Iterator
from typing import Any

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.errors import HarnessError
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_stage import find_ranked
from moe_harness.harness.ranks import pool
from moe_harness.harness.ranks.judge import planned, task_of

SECONDS = 5.0
BUDGET = 5.0  # seconds of one run: a fault that hangs on this case is none that explains it
TOLD = 3
CONFIRMATIONS = 2
OTHERS = 12  # cases looked through for confirmation
ANOTHER_SEED = 501


def named(spec: str, case: str, seconds: float = SECONDS, backend: str = "gloo") -> list[dict[str, str]]:
    """The faults that explain what an implementation does on a failing case; [] where none does."""
    end = time.monotonic() + seconds
    stage, ranks = case.split("/")[0], parse_id(case)[2].R  # type: ignore[attr-defined]
    got = _run(spec, case, backend)
    if got is None or not got[1]:
        return []
    suspects = [fault for fault in all_faults(stage) if fault.sign == "value"]
    alive = _equal(suspects, case, got, end, backend)
    confirmed: list[str] = []
    for other in _others(stage, spec, case, ranks, backend):
        if not alive or time.monotonic() > end or (len(alive) == 1 and len(confirmed) >= CONFIRMATIONS):
            break
        again = _run(spec, other, backend)
        if again is None:
            continue
        alive = _equal(alive, other, again, end, backend)
        confirmed += [other] if again[1] else []
    return [_told(fault, alive, confirmed) for fault in alive[:TOLD]] if confirmed else []


def _run(spec: str, case: str, backend: str) -> tuple[tuple[str | None, ...], bool] | None:
    """(digest of every rank's result, whether a value is wrong); None where it refuses or returns another form."""
    stage, ranks = case.split("/")[0], parse_id(case)[2].R  # type: ignore[attr-defined]
    task = {"impl": spec, "case": case}
    try:
        outcome = pool.run(task_of(stage), task, ranks=ranks, backend=backend, budget=BUDGET, load=(stage, spec))
    except HarnessError:
        return None
    if not outcome.ok:
        return None
    digests = tuple(report.observed.get("digest") for report in outcome.results)
    found = {finding.about for report in outcome.results for finding in report.findings}
    return None if None in digests else (digests, find_ranked(stage).checks[0] in found)


def _equal(suspects: list[Fault], case: str, got: Any, end: float, backend: str) -> list[Fault]:
    """Those with the same results; once the time is over nothing more is known of the others."""
    found = []
    for fault in suspects:
        if time.monotonic() > end:
            break
        result = _run(fault.spec, case, backend)
        if result is not None and result[0] == got[0]:
            found.append(fault)
    return found


def _others(stage: str, spec: str, case: str, ranks: int, backend: str) -> Iterator[str]:
    """The same kind of data drawn anew, then planned cases over as many ranks."""
    _, check, parsed = parse_id(case)
    for turn in (1, 2):
        yield Planned(check, parsed.but(seed=parsed.seed + turn * ANOTHER_SEED)).id
    planned_ids = [other for other in planned(stage, spec, [ranks], backend=backend) if other != case]
    yield from [other for other in planned_ids if parse_id(other)[1] == check][:OTHERS]


def _told(fault: Fault, alive: list[Fault], confirmed: list[str]) -> dict[str, str]:
    text = f"{fault.consequence} The result of every rank has its very bits, also on {confirmed[0]}"
    others = [other.name for other in alive if other is not fault]
    tied = f"; {', '.join(others[:TOLD])} cannot be told from it on any data tried" if others else ""
    return {"fault": fault.name, "evidence": text + tied}
