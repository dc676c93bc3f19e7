"""Annotations on GitHub: one line per cluster of failures, which the pull request shows at the kernel's own line."""

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_harness.harness.report.failure import cluster_lines
from moe_harness.harness.report.results import Result, completed, verdict_of

SHOWN = 10  # errors of one step that GitHub shows


def annotations(results: Iterable[Result]) -> list[str]:
    """Workflow commands for what failed or could not be judged; none outside of a GitHub action."""
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return []
    return [line for result in results for line in _of(completed(result))][:SHOWN]


def _of(result: dict[str, Any]) -> Iterator[str]:
    title, place = f"moe-harness: {result['stage']} {result['impl']}", _place(result["impl"])
    for cluster in result["clusters"]:
        yield _command(place, title, f"{': '.join(cluster_lines(cluster))}\n{cluster['replay']}")
    if not result["clusters"]:
        for failure in result["failures"][:1]:
            yield _command(place, title, f"{failure['message']}\n{failure['replay']}")
        if verdict_of(result) in ("error", "unsupported"):  # type: ignore[arg-type]
            yield _command(place, title, result["error"] or "supports none of the stage's core cases")


def _command(place: dict[str, str], title: str, message: str) -> str:
    properties = {**place, "title": title}
    plain = {name: _escaped(value).replace(":", "%3A").replace(",", "%2C") for name, value in properties.items()}
    told = ",".join(f"{name}={value}" for name, value in plain.items())
    return f"::error {told}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _place(spec: str) -> dict[str, str]:
    """File and line of what a spec names, where that is a file of the repository."""
    target, _, attribute = spec.rpartition(":")
    path = Path(target if target.endswith(".py") else target.replace(".", "/") + ".py")
    if not path.is_file():
        return {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return {"file": str(path)}
    name = attribute.split(".")[-1]
    lines = (getattr(node, "lineno", 1) for node in ast.walk(tree) if getattr(node, "name", None) == name)
    return {"file": str(path), "line": str(next(lines, 1))}
