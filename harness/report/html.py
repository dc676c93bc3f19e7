"""One self-contained HTML page per run: no request leaves it, and everything an implementation wrote is escaped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_harness.harness.report import figures
from moe_harness.harness.report.pages import rendered
from moe_harness.harness.report.results import Result, completed, verdict_of, worst_verdict
from moe_harness.harness.report.terminal import colour, verdict_reason
from moe_harness.harness.report.words import (
    SHOWN_PER_CHECK,
    by_check,
    cell,
    cluster_lines,
    details,
    facts,
    number,
    power_summary,
    signature,
)

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(results: Sequence[Result]) -> str:
    """The page as text."""
    full = [completed(result) for result in results]
    shown = {
        "verdict": worst_verdict(results),
        "title": ", ".join(dict.fromkeys(result["stage"] for result in full)) or "nothing judged",
        "matrix": matrix(full),
        "runs": [run(result) for result in full],
    }
    return rendered(TEMPLATE, shown, trimmed=True, number=number)


def write_html(results: Sequence[Result], path: str | Path) -> None:
    """Write the page to `path`."""
    Path(path).write_text(render(results), encoding="utf-8")


def matrix(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per check with a (status, text) for each implementation."""
    names = dict.fromkeys(check["name"] for result in results for check in result["checks"])
    by_name = [{check["name"]: check for check in result["checks"]} for result in results]
    return [{"check": name, "cells": [cell(checks.get(name)) for checks in by_name]} for name in names]


def run(result: dict[str, Any]) -> dict[str, Any]:
    """One implementation as the template wants it."""
    return {
        "impl": result["impl"],
        "verdict": verdict_of(result),  # type: ignore[arg-type]
        "reason": verdict_reason(result),
        "colour": colour(result),
        "error": result["error"],
        "interrupted": result["interrupted"],
        "not_judged": result["not_judged"],
        "facts": facts(result),
        "checks": [check | {"status": cell(check)[0]} for check in result["checks"]],
        "clusters": [(*cluster_lines(each), each["replay"]) for each in result["clusters"]],
        "failures": failures(result["failures"]),
        "coverage": result["coverage"],
        "power": power_summary(result["coverage"]["power"]),
        "histogram": figures.histogram(result["statistics"]),
        "observations": result["observations"],
    }


def failures(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every failure under its check; the first of each kind is unfolded, up to a few."""
    groups = []
    for check, group in by_check(found).items():
        kinds: set[tuple[Any, ...]] = set()
        entries = []
        for failure in group:
            new = signature(failure) not in kinds and len(kinds) < SHOWN_PER_CHECK
            kinds |= {signature(failure)} if new else set()
            entries.append(failure_entry(failure, unfolded=new))
        groups.append({"check": check, "entries": entries})
    return groups


def failure_entry(failure: dict[str, Any], unfolded: bool) -> dict[str, Any]:
    """One failure as the template wants it."""
    return {
        "message": failure.get("message", ""),
        "case": failure.get("case"),
        "headroom": failure.get("headroom"),
        "details": details(failure),
        "replay": failure.get("replay"),
        "heatmap": figures.heatmap(failure.get("heatmap")),
        "open": unfolded,
    }
