"""The kill matrix: every check against every fault of the catalogue, each until its first kill.

A fault is judged like any implementation, in one worker process (or over the ranks of its cases), its checks and their
cases in the order of a real run.  As many faults are judged at a time as there are cores.  The result is plain data
(`Matrix`).

Until a fault is killed for the first time every case of every check is judged.  After that each further check gets at
most `AFTER_FIRST_KILL` cases, spread evenly over its plan: "survived 24 of 359" then says that 24 were judged, no more.
A fault of a part inside a block gets `OF_A_PART` of them: what each check sees of it stands in the row of the part.

A row also counts the shapes of the cases that kill, as far as three: see `breadth`.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from typing import Any

from moe_harness.harness.core.catalogue import RANKED, Fault
from moe_harness.harness.core.errors import HarnessError
from moe_harness.harness.core.findings import Answer, Finding
from moe_harness.harness.core.names import CHECK_NAMES
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Planned, Request, plan
from moe_harness.harness.core.ranked_stage import find_ranked, rank_checks
from moe_harness.harness.process.pool import DEATHS, Pool
from moe_harness.harness.proof import breadth
from moe_harness.harness.run import property_search

Matrix = dict[str, Any]
Row = dict[str, Any]
Cell = dict[str, Any]

AFTER_FIRST_KILL, OF_A_PART = 24, 4  # 24 for all took 11 minutes on 2 cores
EXAMPLES = 60  # of the check `property`, of those that a quick run draws
WORLDS = (1, 2, 4)  # ranks over which the faults of many ranks are judged
MEMORY_LIMIT = 2 << 30  # bytes a worker may hold: one fault leaks on purpose

# What a check is for that kills no fault first; a check with neither a first kill nor a line here fails the command.
JUSTIFICATIONS = {
    "property": "Last in order, over combinations that the plan leaves out; shrinks to the smallest failing case.",
}


@dataclass(frozen=True)
class MatrixOptions:
    """How faults are judged; `request` says what is asked of each."""

    request: Request = Request()
    jobs: int = 0  # faults at a time; 0: one per core
    timeout: float = 60.0  # seconds one case may take
    hang_timeout: float = 6.0  # the same for faults of the process: a hang should cost little
    after_first: int = AFTER_FIRST_KILL


def run(faults: Iterable[Fault], options: MatrixOptions, heard: Callable[[Row], None] = lambda row: None) -> Matrix:
    """Judge every fault; `heard` gets each row as it is ready.  An interruption leaves out what was not judged."""
    faults = list(faults)
    order = {fault.name: place for place, fault in enumerate(faults)}
    for stage in dict.fromkeys(fault.stage for fault in faults if fault.stage not in RANKED):
        _property_cases(stage, options.request)  # drawn once, before threads share it
    rows: list[Row] = []

    def judge(group: list[Fault]) -> None:
        for fault in group:
            rows.append(judge_fault(fault, options))
            heard(rows[-1])

    with ThreadPoolExecutor(options.jobs or len(os.sched_getaffinity(0))) as threads:
        futures = [threads.submit(judge, group) for group in _groups(faults)]
        try:
            for future in as_completed(futures):
                future.result()
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            raise
    rows.sort(key=lambda row: order[row["fault"]])
    return matrix(rows, options)


def judge_fault(fault: Fault, options: MatrixOptions) -> Row:
    """One row: what each check did with the fault."""
    row: Row = {
        "fault": fault.name, "stage": fault.stage, "family": fault.family, "source": fault.source,
        "condition": fault.condition, "consequence": fault.consequence, "status": "survived", "reason": None,
        "first_killer": None, "checks": {}, "killing": [], "shapes": 0, "few": fault.few, "seconds": 0.0,
    }  # fmt: skip
    if fault.stage in RANKED and options.request.device != "cpu":
        return row | {"status": "skipped", "reason": "faults of many ranks are judged with --device cpu"}
    if options.request.device not in fault.devices:
        return row | {"status": "skipped", "reason": f"needs --device {' or '.join(fault.devices)}"}
    started = time.monotonic()
    hangs = fault.sign == "process" and not fault.stateful  # a leak takes its time, and is no hang
    budget = options.hang_timeout if hangs else options.timeout
    if fault.stage in RANKED:
        _fill_ranked(row, fault, options)
        return row | {"seconds": round(time.monotonic() - started, 2)}
    try:
        with Pool(fault.stage, fault.spec, options.request.device, 1, budget) as pool:
            pool.memory_limit = MEMORY_LIMIT if options.request.device == "cpu" else None
            declared = pool.start().dtypes
            dtypes = tuple(d for d in options.request.dtypes if d in declared)
            after_first = min(OF_A_PART, options.after_first) if fault.part else options.after_first
            _fill(row, pool, dtypes, options.request, after_first)
    except HarnessError as error:
        row |= {"status": "skipped", "reason": f"cannot be judged: {error}"}
    return row | {"seconds": round(time.monotonic() - started, 2)}


def _fill(row: Row, pool: Pool, dtypes: tuple[str, ...], request: Request, after_first: int) -> None:
    """Every check in the order of a run."""
    asked = Request(request.profile, request.device, dtypes, request.configs, request.seed)
    judged, left = 0, []
    for check, ids in _by_check(row["stage"], asked).items():
        if check in ON_CUDA_ONLY and request.device != "cuda":
            row["checks"][check] = _cell("not run", 0, len(ids), "needs --device cuda")
            continue
        sample = list(ids) if row["status"] == "survived" else spread(ids, after_first)
        cell = row["checks"][check] = _judge_check(pool, sample, len(ids))
        judged += cell["cases"]
        left += sorted(set(ids) - set(sample[: cell["cases"]]), key=ids.index)
        row["killing"] += [cell["case"]] if cell["status"] == "killed" else []
        if cell["status"] == "killed" and row["status"] == "survived":
            row["status"] = "killed"
            row["first_killer"] = {"check": check, "case": cell["case"], "cases": judged, "of_check": cell["cases"]}
    deaths = pool.deaths + DEATHS  # three shapes are sought of a fault that hangs too, which a run would have given up

    def kills(case_id: str) -> bool:
        pool.forgive()
        return pool.deaths < deaths and pool.judge_one(case_id).fails

    _broaden(row, left, kills)


def _broaden(row: Row, left: list[str], kills: Callable[[str], bool]) -> None:
    """Look among the cases that are left for three shapes that kill, and count the shapes."""
    if row["killing"]:
        breadth.seek(row["killing"], left, kills)
    row["shapes"] = breadth.shapes(row["killing"])


def _fill_ranked(row: Row, fault: Fault, options: MatrixOptions) -> None:
    """Every planned case until the first kill, some of the rest after it; a finding says which check it is of."""
    from moe_harness.harness.ranks.judge import judge, planned

    request = options.request
    ids = all_ids = planned(fault.stage, fault.spec, WORLDS, profile=request.profile, seed=request.seed)
    judged, breakdowns, seen = 0, 0, set[str]()
    while ids and breakdowns < DEATHS:
        case_id, *ids = ids
        judged += 1
        seen.add(case_id)
        verdict = judge(fault.spec, case_id, budget=options.timeout)
        breakdowns += verdict.failure is not None
        row["killing"] += [case_id] if verdict.findings else []
        for finding in verdict.findings:
            _kill(row, case_id, finding, judged, judged + len(ids))
        if row["status"] == "survived" and verdict.findings:
            check = verdict.findings[0].about
            row["first_killer"] = {"check": check, "case": case_id, "cases": judged, "of_check": judged}
            row["status"], ids = "killed", spread(ids, options.after_first)
    for check in find_ranked(fault.stage).findings:
        row["checks"].setdefault(check, _cell("survived", judged, judged, None))
    left = [case_id for case_id in all_ids if case_id not in seen]
    _broaden(row, left, lambda case_id: bool(judge(fault.spec, case_id, budget=options.timeout).findings))


def _kill(row: Row, case_id: str, finding: Finding, cases: int, planned: int) -> None:
    message = finding.message.splitlines()[0][:300]
    cell = _cell("killed", cases, planned, None) | {"case": case_id, "message": message}
    row["checks"].setdefault(finding.about, cell)


def _judge_check(pool: Pool, ids: list[str], planned: int) -> Cell:
    """Until the first kill."""
    if pool.deaths >= DEATHS:
        return _cell("not run", 0, planned, f"after {DEATHS} crashes or hangs nothing more is judged, as in a run")
    executed, reason = 0, None
    for count, case_id in enumerate(ids, 1):
        answer = pool.judge_one(case_id)
        if answer.fails:
            message = answer.reason or answer.findings[0].message
            return _cell("killed", count, planned, None) | {"case": case_id, "message": message.splitlines()[0][:300]}
        executed += answer.status == "passed"
        reason = answer.reason or reason
    return _cell("survived" if executed else "unsupported", len(ids), planned, None if executed else reason)


def _cell(status: str, cases: int, planned: int, reason: str | None) -> Cell:
    """`cases` were judged of `planned`; status killed, survived, unsupported or not run."""
    return {"status": status, "cases": cases, "planned": planned, "reason": reason}


def spread(ids: list[str], count: int) -> list[str]:
    """At most `count` of `ids`, evenly spaced, in their order."""
    return list(ids) if len(ids) <= count else [ids[place * len(ids) // count] for place in range(count)]


@cache
def _by_check(stage: str, request: Request) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for planned in plan(stage, request):
        found.setdefault(planned.check, []).append(planned.id)
    return found | {"property": _property_cases(stage, request)}


@cache
def _property_cases(stage: str, request: Request) -> list[str]:
    """The cases Hypothesis draws in a run in which nothing fails."""
    drawn = property_search.search(
        stage, request.dtypes, lambda case: Answer(Planned("property", case).id, "passed"), examples=EXAMPLES,
        start=request.seed, seconds=float("inf"),
    )  # fmt: skip
    return [answer.id for answer in drawn]


def _groups(faults: list[Fault]) -> list[list[Fault]]:
    """What one thread judges in turn: all that needs the ranks of this process, any other fault alone.

    Longest first, so that both cores end at about the same time.
    """
    ranked = [fault for fault in faults if fault.stage in RANKED]
    others = [[fault] for fault in faults if fault.stage not in RANKED]
    others.sort(key=lambda group: (group[0].sign != "process", group[0].stage != "experts"))
    return ([ranked] if ranked else []) + others


# --------------------------------------------------------------------------------------------------------- what it says


def matrix(rows: list[Row], options: MatrixOptions) -> Matrix:
    """Rows and what follows from them; `seconds` are those of judging, of however many faults at a time."""
    checks = [name for name in _check_order() if any(name in row["checks"] for row in rows)]
    judged = [row for row in rows if row["status"] != "skipped"]
    return {
        "schema": 1, "profile": options.request.profile, "device": options.request.device, "seed": options.request.seed,
        "seconds": round(sum(row["seconds"] for row in rows), 1), "after_first_kill": options.after_first,
        "after_first_kill_of_a_part": min(OF_A_PART, options.after_first), "checks": checks,
        "killed": sum(row["status"] == "killed" for row in judged), "judged": len(judged),
        "survivors": [row["fault"] for row in judged if row["status"] == "survived"],
        "wanted_shapes": breadth.WANTED, "thin": [row["fault"] for row in judged if thin(row)],
        "skipped": [{"fault": row["fault"], "reason": row["reason"]} for row in rows if row["status"] == "skipped"],
        "summary": [summary(check, judged) for check in checks], "rows": rows,
    }  # fmt: skip


def summary(check: str, rows: list[Row]) -> dict[str, Any]:
    """What one check is worth: what it kills, kills first, and kills alone."""
    killed = [row for row in rows if _kills(row, check)]
    first = [row["fault"] for row in killed if row["first_killer"]["check"] == check]
    only = [row["fault"] for row in killed if sum(_kills(row, other) for other in row["checks"]) == 1]
    executed = any(row["checks"].get(check, {}).get("cases") for row in rows)
    why = None if first else JUSTIFICATIONS.get(check) if executed else "not run on this device"
    return {"check": check, "kills": len(killed), "first": first, "only": only, "justification": why}


def thin(row: Row) -> bool:
    """Whether too few shapes kill the fault, without a reason."""
    return row["status"] == "killed" and row["shapes"] < breadth.WANTED and not row["few"]


def unjustified(result: Matrix) -> list[str]:
    """Checks that are the first killers of nothing, without a reason; empty for a part of the catalogue."""
    return [entry["check"] for entry in result["summary"] if not entry["first"] and not entry["justification"]]


def _kills(row: Row, check: str) -> bool:
    return row["checks"].get(check, {}).get("status") == "killed"


def _check_order() -> Iterator[str]:
    yield from dict.fromkeys((*CHECK_NAMES, *rank_checks()))
