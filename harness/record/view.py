"""A comparison for people: a table, and a page with the two runs side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe_harness.harness.record.compare import LEVELS, Comparison
from moe_harness.harness.record.line import Line

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"regression": "bold red", "warning": "yellow", "refused": "yellow", "improvement": "green", "note": "dim"}


def summary(found: Comparison) -> str:
    """The outcome in a sentence."""
    counts = {level: sum(change.level == level for change in found.changes) for level in LEVELS}
    told = ", ".join(f"{n} refused" if level == "refused" else counted(n, level) for level, n in counts.items() if n)
    return f"{counted(found.compared, 'result')} compared: {told or 'nothing differs'}"


def counted(number: int, noun: str) -> str:
    """1 result, 2 results."""
    return f"{number} {noun}{'s' * (number != 1)}"


def show(found: Comparison, console: "Console") -> None:
    """Print what differs, the worst first."""
    from rich.table import Table
    from rich.text import Text

    if found.changes:
        table = Table(box=None, pad_edge=False)
        for name in ("", "result", "case", "before", "after", ""):
            table.add_column(name, overflow="fold")
        for change in sorted(found.changes, key=lambda change: LEVELS.index(change.level)):
            cells = (change.name, change.case, change.before, change.after, change.why)
            table.add_row(Text(change.level, style=STYLES[change.level]), *map(Text, cells))
        console.print(table)
    console.print(Text(summary(found), style="bold red" if found.regressed else "bold green"))


def write_html(
    found: Comparison, old: Mapping[tuple[str, str], Line], new: Mapping[tuple[str, str], Line], path: Path
) -> None:
    """A page of its own: what differs, then both runs side by side."""
    from moe_harness.harness.report.pages import rendered

    sides = [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    changes = sorted(found.changes, key=lambda change: LEVELS.index(change.level))
    shown = {"summary": summary(found), "changes": changes, "sides": sides, "regressed": found.regressed}
    page = rendered(Path(__file__).with_name("page.html.j2"), {**shown, "digest": digest})
    path.write_text(page, "utf-8")


def digest(line: Line | None) -> list[tuple[str, str]]:
    """What is told of one run on the page."""
    if line is None:
        return [("", "absent")]
    import statistics

    where = line["environment"]
    rows = [("recorded", line["recorded"]), ("device", str(where.get("device")))]
    for told, tree in (("commit of the project", where.get("project") or {}), ("commit of moe-harness", where)):
        rows += [(told, f"{(tree.get('commit') or '-')[:12]}{' (changed)' if tree.get('dirty') else ''}")]
    rows += [(package, number) for package, number in where.get("versions", {}).items()]
    rows += [(case, verdict["verdict"]) for case, verdict in line.get("verdicts", {}).items()]
    for case, time in line.get("times", {}).items():
        median = statistics.median(time["rounds"])
        over = f", {median / time['floor']:.2f} of the floor" if time["floor"] else ""
        rows.append((case, f"{median:.2f} us{over}, {len(time['rounds'])} rounds"))
    return rows
