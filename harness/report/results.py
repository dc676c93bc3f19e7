"""The result of one judged implementation as plain data, and what follows from several of them.

A result is a JSON-ready dict (`Result`).  Keys that a run has nothing to say about may be left out: `completed` fills
them in.  `case` counts: `cases` is all that a check met, so executed = cases - unsupported - skipped.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict

SCHEMA = 1
WORST_FIRST = ("fail", "error", "unsupported", "pass")


class Check(TypedDict, total=False):
    """One check on one implementation; `worst` is the largest fraction of a bound that was used, > 1 fails."""

    name: str
    cases: int
    judged: int  # of them; the others were refused (unsupported) or skipped
    failed: int
    unsupported: int
    skipped: int
    reasons: list[dict[str, Any]]  # why cases were not judged: {"reason", "cases"}
    seconds: float
    worst: float | None


class Heatmap(TypedDict, total=False):
    """Error over the output, at most 64x64 cells, pooled by the maximum; None (or 1e9) stands for NaN and infinity.

    `limit` is the value at which an element fails, `unit` says what the values are ("|z|"), and `shape` is the shape
    of the output itself where a cell stands for several elements.
    """

    rows: str
    columns: str
    values: list[list[float | None]]
    limit: float | None
    unit: str
    shape: list[int]


class Diagnosis(TypedDict):
    """A known fault that explains the output, and how well."""

    fault: str
    evidence: str


class Failure(TypedDict, total=False):
    """One failed case: what was compared, where, how far off, the likely cause and the line that repeats it."""

    check: str
    case: str
    message: str
    headroom: float | None
    where: dict[str, Any]
    looks_like: list[str]
    diagnosis: list[Diagnosis]
    known: int  # faults that were compared with the output, where a cause was asked for
    replay: str
    heatmap: Heatmap | None
    impl: str


class FailureCluster(TypedDict):
    """Failures of one condition; `passed` are passing cases that it holds for too, `passed_without` the other ones.

    `cause` is a known fault or None, `kinds` what the failures say, `condition` None where none tells them apart.
    Clusters of one cause are one, with them as its `parts`: `condition` joins theirs, `passed` counts for each of them.
    """

    cause: str | None
    kinds: list[str]
    condition: str | None
    failed: int
    passed: int
    passed_without: int
    case: str
    replay: str
    parts: "NotRequired[list[FailureCluster]]"


class Unsupported(TypedDict):
    """Inputs that the implementation refuses, with its own words."""

    reason: str
    cases: int
    example: str


class Skipped(TypedDict):
    """Cases that this run could not execute, and why."""

    what: str
    reason: str
    cases: int


class Power(TypedDict):
    """Data sets on which every standard wrong output was rejected, and those that took the place of others."""

    proved: int
    replaced: list[dict[str, Any]]  # {"case", "by", "accepted": names of the wrong outputs that passed}


class Coverage(TypedDict):
    """The ledger: what was executed, what was not and why, and how often each value of each axis was met."""

    executed: int
    unsupported: list[Unsupported]
    skipped: list[Skipped]
    power: Power
    axes: dict[str, dict[str, int]]


class Result(TypedDict, total=False):
    """Everything that a run found out about one implementation."""

    schema: int
    verdict: str
    stage: str
    impl: str
    device: str
    dtypes: list[str]
    profile: str
    config: str | None
    seed: int
    seconds: float
    versions: dict[str, str | None]
    declared: dict[str, Any]
    error: str | None
    interrupted: bool
    not_judged: list[str]  # of the models of --config, what this stage does not cover
    checks: list[Check]
    judged: float  # share of the planned cases
    clusters: list[FailureCluster]
    failures: list[Failure]
    coverage: Coverage
    statistics: dict[str, Any]  # {"z_histogram": {"edges", "counts", "limit"}, "elements"}; from 0 on it is one of |z|
    observations: list[dict[str, str]]


def completed(result: Result) -> dict[str, Any]:
    """The result with every absent or null collection replaced by an empty one, so that reports need not ask."""
    empty = empty_coverage()
    full: dict[str, Any] = {"verdict": "error", "stage": "?", "impl": "?", "error": None, "interrupted": False}
    full |= result
    for key, kind in {"versions": dict, "declared": dict, "statistics": dict}.items():
        full[key] = full.get(key) or kind()
    for key in ("checks", "clusters", "failures", "observations", "dtypes", "not_judged"):
        full[key] = full.get(key) or []
    full["coverage"] = empty | {key: value for key, value in (full.get("coverage") or {}).items() if value is not None}
    return full


def empty_coverage() -> dict[str, Any]:
    """The ledger of a run that did nothing."""
    power: dict[str, Any] = {"proved": 0, "replaced": []}
    return {"executed": 0, "unsupported": [], "skipped": [], "power": power, "axes": {}}


def executed(result: Result) -> int:
    """Cases that ran to a judgement."""
    return completed(result)["coverage"]["executed"]


def verdict_of(result: Result) -> str:
    """The verdict as it counts: a "pass" with a failure beside it, or over nothing at all, is not one."""
    full = completed(result)
    if full["failures"] or any(check.get("failed", 0) for check in full["checks"]):
        return "fail"
    if full["verdict"] == "pass" and executed(result) == 0:
        return "error"
    return full["verdict"]


def worst_verdict(results: Iterable[Result]) -> str:
    """The worst verdict of several implementations; "error" where there are none."""
    verdicts = {verdict_of(result) for result in results}
    return next((verdict for verdict in WORST_FIRST if verdict in verdicts), "error")


def exit_status(results: Sequence[Result]) -> int:
    """0 every check passed, 1 a check failed, 3 could not judge (error, unsupported, nothing executed, cut short)."""
    verdict = worst_verdict(results)
    if verdict == "fail":
        return 1
    if verdict == "pass" and not any(result.get("interrupted") for result in results):
        return 0
    return 3


def to_json(results: Sequence[Result]) -> dict[str, Any]:
    """The document of `--json`: one result as it is; several summed up, each whole under "runs"."""
    if len(results) == 1:
        return finite(results[0] | {"schema": SCHEMA, "verdict": verdict_of(results[0])})
    full = [completed(result) for result in results]
    merged = {
        "schema": SCHEMA,
        "verdict": worst_verdict(results),
        "stage": full[0]["stage"] if full else None,
        "impl": [result["impl"] for result in full],
        "interrupted": any(result["interrupted"] for result in full),
        "checks": sum_checks(full),
        "judged": min((result.get("judged") or 0.0 for result in full), default=0.0),
        "clusters": [each | {"impl": result["impl"]} for result in full for each in result["clusters"]],
        "failures": [failure | {"impl": result["impl"]} for result in full for failure in result["failures"]],
        "coverage": sum_coverage([result["coverage"] for result in full]),
        "runs": [result | {"schema": SCHEMA, "verdict": verdict_of(result)} for result in results],
    }
    return finite(merged)


def sum_checks(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts of each check over all implementations; `worst` is the largest."""
    sums: dict[str, dict[str, Any]] = {}
    for check in (check for result in results for check in result["checks"]):
        into = sums.setdefault(check["name"], {"name": check["name"], "worst": None})
        for key in ("cases", "failed", "unsupported", "skipped", "seconds"):
            into[key] = into.get(key, 0) + check.get(key, 0)
        into["judged"] = into["cases"] - into["unsupported"] - into["skipped"]
        add_entries(into.setdefault("reasons", []), check.get("reasons") or [], ("reason",))
        if check.get("worst") is not None:
            into["worst"] = max(check["worst"], into["worst"] or 0.0)
    return list(sums.values())


def sum_coverage(ledgers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One ledger for several: counts added where the reason is the same."""
    total = empty_coverage()
    for ledger in ledgers:
        total["executed"] += ledger["executed"]
        total["power"]["proved"] += ledger["power"]["proved"]
        total["power"]["replaced"] += ledger["power"]["replaced"]
        for key, same in (("unsupported", ("reason",)), ("skipped", ("what", "reason"))):
            add_entries(total[key], ledger[key], same)
        for axis, counts in ledger["axes"].items():
            into = total["axes"].setdefault(axis, {})
            for value, cases in counts.items():
                into[value] = into.get(value, 0) + cases
    return total


def add_entries(total: list[dict[str, Any]], entries: Iterable[dict[str, Any]], same: tuple[str, ...]) -> None:
    """Add each entry's cases to the one of `total` that agrees in the keys `same`, or append a copy."""
    for entry in entries:
        for known in total:
            if all(known.get(key) == entry.get(key) for key in same):
                known["cases"] += entry["cases"]
                break
        else:
            total.append(dict(entry))


def finite(value: Any) -> Any:
    """The same data with None for NaN and infinities, which JSON cannot write."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(results: Sequence[Result]) -> str:
    """The text of `--json`: indented, but a row of numbers on one line, since a heat map has thousands."""
    return _indented(to_json(results), "") + "\n"


def _indented(value: Any, margin: str) -> str:
    inner = margin + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_indented(entry, inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        return "[\n" + ",\n".join(inner + _indented(entry, inner) for entry in value) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False)
