"""From the JSON of a command to the line that is kept: verdicts, statistics, every round of every time, documents.

    {"schema", "kind", "name", "recorded", "command", "environment", "source", "seed",
     "verdicts": {case: {"verdict", "cases", "judged"}}, "statistics": {case: {"rms", "elements"}},
     "times": {case: {"rounds", "floor"}}, "ceilings": {...}, "documents": [...]}

`name` says what was run (stage or task, and implementation): lines of one name are compared with each other.
"""

import datetime
import math
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_harness.harness.core.errors import HarnessError, UsageError
from moe_harness.harness.gate.identity import PACKAGES, source_hash, version

SCHEMA = 1
Line = dict[str, Any]


def lines(result: Any, command: str = "") -> list[Line]:
    """The lines of what `--json` of a command wrote, one for each implementation.

    Raises:
        UsageError: JSON of none of the commands.
    """
    found = [line for part in (result if isinstance(result, list) else [result]) for line in _of(part)]
    if not found:
        raise UsageError("this is no result of check, bench, gate or faults")
    where, when = environment(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for line in found:
        line["environment"] = where | line.pop("about", {})
        line |= {"schema": SCHEMA, "recorded": when, "command": command or line.get("command", "")}
    return found


def _of(result: Any) -> Iterator[Line]:
    if not isinstance(result, dict):
        raise UsageError("this is no result of check, bench, gate or faults: not a JSON object")
    if result.get("kind") == "gate":
        yield _gate(result)
    elif "results" in result and isinstance(result["results"], list):
        for part in result["results"]:
            yield from _of(part)
    elif "timings" in result:
        yield from _bench(result)
    elif "checks" in result:
        yield _check(result)
    elif "rows" in result and "survivors" in result:
        yield _faults(result)
    else:
        raise UsageError(f"this is no result of check, bench, gate or faults: it has {', '.join(list(result)[:6])}")


def _check(result: dict[str, Any]) -> Line:
    verdicts = {"all": {"verdict": result["verdict"], "cases": sum(c["cases"] for c in result["checks"])}}
    verdicts["all"]["judged"] = verdicts["all"]["cases"] - sum(_unjudged(c) for c in result["checks"])
    for check in result["checks"]:
        judged = check["cases"] - _unjudged(check)
        verdict = "fail" if check["failed"] else "pass" if judged else "unsupported"
        verdicts[check["name"]] = {"verdict": verdict, "cases": check["cases"], "judged": judged}
    dtypes = ",".join(result.get("dtypes") or ())
    return {
        "kind": "check", "name": f"{result['stage']} {result['impl']} {result.get('device', '')} {dtypes}".strip(),
        "source": _source(result["stage"], result["impl"]), "seed": result.get("seed"), "verdicts": verdicts,
        "statistics": _statistics(result.get("statistics") or {}),
    }  # fmt: skip


def _unjudged(check: dict[str, Any]) -> int:
    return check.get("unsupported", 0) + check.get("skipped", 0)


def _statistics(found: dict[str, Any]) -> dict[str, Any]:
    """The root mean square of z from its histogram, and of how many elements; the middle of a bin stands for it."""
    histogram, elements = found.get("z_histogram") or {}, found.get("elements") or 0
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    if not elements or len(edges) != len(counts) + 1:
        return {}
    middles = [a if b is None else (a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]  # the last is open
    square = sum(n * m * m for n, m in zip(counts, middles, strict=True)) / max(sum(counts), 1)
    return {"z": {"rms": math.sqrt(square), "elements": sum(counts)}}


def _bench(result: dict[str, Any]) -> Iterator[Line]:
    for spec in dict.fromkeys(timing["spec"] for timing in result["timings"]):
        timings = [timing for timing in result["timings"] if timing["spec"] == spec]
        verdicts = {f"{t['tokens']} tokens": {"verdict": "unsupported" if t["refused"] else "pass"} for t in timings}
        times = {
            f"{t['tokens']} tokens": {"rounds": t.get("rounds") or [t["median"]], "floor": t["floor"]}
            for t in timings if not t["refused"]
        }  # fmt: skip
        model = result["model"]["name"] if isinstance(result["model"], dict) else result["model"]
        yield {
            "kind": "bench", "name": f"{result['stage']} {spec} {model} EP{result['ep_size']} {result['dtype']}",
            "source": _source(result["stage"], spec), "verdicts": verdicts, "times": times,
            "ceilings": {name: result[name] for name in ("copy_bandwidth", "matrix_rate", "launch")},
            "command": result.get("command", ""), "about": {"device": result["device"]},
        }  # fmt: skip


def _gate(result: dict[str, Any]) -> Line:
    documents = [
        {"doc_hash": row["doc_hash"], "prompt_hash": row["prompt_hash"], **row["candidate"]} for row in result["rows"]
    ]
    identity = (result.get("about") or {}).get("candidate", {}).get("identity", {})
    return {
        "kind": "gate", "name": f"{result['task']} {result['candidate']}", "source": identity.get("source"),
        "model": identity.get("model"),
        "verdicts": {"gate": {"verdict": result["verdict"], "cases": result["documents"]}},
        "documents": documents, "margin": result["margin"], "command": result.get("command", ""),
        "about": {"device": identity["device"]} if "device" in identity else {},
    }  # fmt: skip


def _faults(result: dict[str, Any]) -> Line:
    """A fault that is killed is a pass of the suites."""
    survivors = {found if isinstance(found, str) else found["fault"] for found in result["survivors"]}
    verdicts = {row["fault"]: {"verdict": "fail" if row["fault"] in survivors else "pass"} for row in result["rows"]}
    return {"kind": "faults", "name": "catalogue", "source": None, "seed": result.get("seed"), "verdicts": verdicts}


def environment() -> dict[str, Any]:
    """Versions, commits, and what the driver says of the device; nothing is imported for it.

    `commit` and `dirty` are of the tree of moe-harness, `project` the same of the one in which the command was called:
    whose kernels are judged.
    """
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader")
    name, driver, clock, most = [*(gpu.splitlines() or [""])[0].split(", "), "", "", ""][:4]
    return {
        "versions": {"python": platform.python_version()}
        | {package: found for package in PACKAGES if (found := version(package))},
        **_commit(Path(__file__).parent), "project": _commit(Path.cwd()),
        "device": name or platform.machine(), "driver": driver or None, "clocks": [clock, most] if clock else None,
    }  # fmt: skip


def _commit(folder: Path) -> dict[str, Any]:
    """The commit of the tree that holds a folder, and whether files of it were changed; None outside a repository."""
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    changed = bool(_output("git", "-C", str(folder), "status", "--porcelain", "-uno")) if commit else None
    return {"commit": commit or None, "dirty": changed}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _source(stage: str, spec: str) -> str | None:
    """The source behind a spec, where it can be imported here."""
    from moe_harness.harness.core import registry

    try:
        return source_hash(registry.find(stage, spec))
    except HarnessError:  # a library that is absent, a file that moved: then there is no source to name
        return None
