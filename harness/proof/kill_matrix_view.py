"""The kill matrix shown: a table for the terminal, a self-contained page, and an SVG for the README."""

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_harness.harness.proof.kill_matrix import Cell, Matrix, Row
from moe_harness.harness.report.pages import rendered

SHORT = {
    "contract": "contr", "numeric": "num", "routing": "rout", "sentinels": "sent", "layouts": "layout",
    "memory": "mem", "special": "spec", "determinism": "det", "batch_invariance": "batch", "property": "prop",
    "graph_replay": "graph", "side_stream": "stream", "large_offsets": "large",
}  # fmt: skip
MARKS = {"survived": "·", "unsupported": "u", "not run": ""}

# ------------------------------------------------------------------------------------------------------------ terminal


def print_matrix(result: Matrix, console: Console) -> None:
    """The matrix, what each check is worth, and the survivors."""
    width = console.width if console.is_terminal else 160
    wide = Console(file=console.file, width=max(width, 110), force_terminal=console.is_terminal)
    for stage in dict.fromkeys(row["stage"] for row in result["rows"]):
        wide.print(_table(stage, [row for row in result["rows"] if row["stage"] == stage], result))
    wide.print(
        "a number: killed after so many cases of that check, [bold green]green[/] first; ·: survived; u: refused"
    )
    few, fewer = result["after_first_kill"], result["after_first_kill_of_a_part"]
    wide.print(f"after the first kill a check judges at most {few} of its cases (..._in_block: {fewer})\n", style="dim")
    wide.print(_worth(result))
    for entry in result["skipped"]:
        wide.print(f"skipped  {entry['fault']}: {entry['reason']}", style="dim", highlight=False)
    counted = {row["fault"]: row["shapes"] for row in result["rows"]}
    for name in result["thin"]:
        told = f"{counted[name]} of the {result['wanted_shapes']} wanted"
        wide.print(f"[bold red]thin[/]  {name}: killed by cases of so many shapes: {told}", highlight=False)
    for name in result["survivors"]:
        wide.print(f"[bold red]survived[/]  {name}", highlight=False)
    wide.print(headline(result), style="bold", highlight=False)


def headline(result: Matrix) -> str:
    """One line that says it all."""
    text = f"{result['killed']} of {result['judged']} faults killed, {result['seconds'] / 60:.0f} min of judging"
    return text + (f", {len(result['skipped'])} skipped" if result["skipped"] else "")


def _table(stage: str, rows: list[Row], result: Matrix) -> Table:
    checks = [c for c in result["checks"] if any(_shown(row["checks"].get(c)) for row in rows)]
    table = Table(title=stage, title_justify="left", box=None, pad_edge=False)
    table.add_column("fault", no_wrap=True)
    for check in checks:
        table.add_column(SHORT.get(check, check), justify="right")
    table.add_column("shapes", justify="right")
    table.add_column("first killer", no_wrap=True)
    for row in rows:
        first = row["first_killer"]
        told = f"{first['check']}, case {first['cases']}" if first else f"[red]{row['status']}[/]"
        table.add_row(row["fault"], *(_text(row, check) for check in checks), str(row["shapes"]), told)
    return table


def _shown(cell: Cell | None) -> bool:
    return cell is not None and cell["status"] != "not run"


def _text(row: Row, check: str) -> str:
    cell = row["checks"].get(check)
    if cell is None:
        return ""
    if cell["status"] != "killed":
        return MARKS[cell["status"]]
    first = row["first_killer"]["check"] == check
    return f"[bold green]{cell['cases']}[/]" if first else str(cell["cases"])


def _worth(result: Matrix) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("check", "kills", "first", "alone"):
        table.add_column(name, justify="left" if name == "check" else "right")
    table.add_column("kills alone, or why it stays")
    for entry in result["summary"]:
        counts = (str(entry["kills"]), str(len(entry["first"])), str(len(entry["only"])))
        table.add_row(entry["check"], *counts, entry["justification"] or ", ".join(entry["only"][:4]))
    return table


# ---------------------------------------------------------------------------------------------------------- JSON, page


def write_json(result: Matrix, path: Path) -> None:
    """The whole matrix as data."""
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in result["rows"])
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n]\n}}\n', encoding="utf-8")


def write_html(result: Matrix, path: Path) -> None:
    """One self-contained page."""
    stages = {stage: [r for r in result["rows"] if r["stage"] == stage] for stage in _stages(result)}
    shown = {"result": result, "stages": stages, "headline": headline(result), "colour": colour, "told": told}
    page = rendered(Path(__file__).with_name("kill_matrix.html.j2"), shown, trimmed=True)
    path.write_text(page, encoding="utf-8")


def _stages(result: Matrix) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in result["rows"]))


def told(cell: Cell | None) -> str:
    """What a cell means, in words."""
    if cell is None:
        return "no such check of this stage"
    if cell["status"] == "killed":
        return f"killed by case {cell['cases']}: {cell.get('message', '')}"
    if cell["status"] == "not run":
        return f"not run: {cell['reason']}"
    return f"{cell['status']} {cell['cases']} of {cell['planned']} cases"


def colour(row: Row, check: str) -> str:
    """Green for the first killer (pale where it took long), blue for later ones, grey for none, red for survivors."""
    cell = row["checks"].get(check)
    if cell is None or cell["status"] == "not run":
        return "#ffffff"
    if cell["status"] != "killed":
        return "#f3c6c2" if row["status"] == "survived" else "#e8eaee"
    late = min(1.0, math.log10(cell["cases"]) / 2.5)
    first = row["first_killer"]["check"] == check
    dark, pale = ((17, 110, 60), (160, 214, 178)) if first else ((56, 104, 170), (188, 208, 235))
    return "#" + "".join(f"{round(a + (b - a) * late):02x}" for a, b in zip(dark, pale, strict=True))


# ------------------------------------------------------------------------------------------------------------- picture

CELL_WIDTH, CELL_HEIGHT, GAP, HEAD, ROWS_PER_PANEL = 13, 5, 26, 92, 75


def write_picture(result: Matrix, path: Path) -> None:
    """The matrix as an SVG: one panel per stage (two where it is long), a row per fault, a column per check."""
    path.write_text("\n".join(_svg(result)) + "\n", encoding="utf-8")


def _svg(result: Matrix) -> Iterator[str]:
    panels = list(_panels(result))
    width = sum(CELL_WIDTH * len(checks) + GAP for _, checks, _ in panels) + GAP + 30
    tallest = max((len(rows) for _, _, rows in panels), default=1)
    height = HEAD + 34 + tallest * CELL_HEIGHT + 40
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
           'font-family="sans-serif" font-size="10" fill="#1a2230">')  # fmt: skip
    yield f'<rect width="{width}" height="{height}" fill="#fff"/>'
    text = f"{headline(result)} ({result['profile']} profile, {result['device']})"
    yield f'<text x="{GAP}" y="18" font-size="13" font-weight="bold">{escape(text)}</text>'
    x = GAP
    for title, checks, rows in panels:
        yield from _panel(x, title, checks, rows)
        x += CELL_WIDTH * len(checks) + GAP
    yield from _legend(height - 16)
    yield "</svg>"


def _panels(result: Matrix) -> Iterator[tuple[str, list[str], list[Row]]]:
    for stage in _stages(result):
        rows = [row for row in result["rows"] if row["stage"] == stage and row["status"] != "skipped"]
        rows.sort(key=lambda row: _order(row, result["checks"]))
        checks = [c for c in result["checks"] if any(_shown(row["checks"].get(c)) for row in rows)]
        for start in range(0, len(rows), ROWS_PER_PANEL):
            yield (stage if not start else ""), checks, rows[start : start + ROWS_PER_PANEL]


def _order(row: Row, checks: list[str]) -> tuple[int, int]:
    first = row["first_killer"]
    return (checks.index(first["check"]), first["cases"]) if first else (-1, 0)  # survivors on top


def _panel(x: int, title: str, checks: list[str], rows: list[Row]) -> Iterator[str]:
    top = HEAD + 34
    yield f'<text x="{x}" y="40" font-weight="bold">{escape(title)}</text>'
    for place, check in enumerate(checks):
        at = x + place * CELL_WIDTH + 10
        yield f'<text transform="translate({at},{top - 4}) rotate(-90)" font-size="9">{escape(check)}</text>'
    for line, row in enumerate(rows):
        y = top + line * CELL_HEIGHT
        told = f"{row['fault']}: {row['condition']}; cases of {row['shapes']} shapes kill it"
        yield f"<g><title>{escape(told)}</title>"
        for place, check in enumerate(checks):
            yield (f'<rect x="{x + place * CELL_WIDTH}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" '
                   f'fill="{colour(row, check)}"/>')  # fmt: skip
        yield "</g>"


def _legend(y: int) -> Iterator[str]:
    x = GAP
    entries = {
        "#116e3c": "first to kill, at once",
        "#a0d6b2": "first to kill, after hundreds of cases",
        "#3868aa": "kills too",
        "#e8eaee": "does not",
        "#f3c6c2": "survivor",
    }
    for fill, text in entries.items():
        yield f'<rect x="{x}" y="{y - 8}" width="10" height="8" fill="{fill}"/><text x="{x + 14}" y="{y}">{text}</text>'
        x += 24 + 6 * len(text)


def picture_facts(result: Matrix) -> dict[str, Any]:
    """What goes into docs/kill_matrix.json beside the picture: the same rows, without the messages."""
    dropped = ("message", "case")
    rows = []
    for row in result["rows"]:
        cells = {c: {k: v for k, v in cell.items() if k not in dropped} for c, cell in row["checks"].items()}
        rows.append(row | {"checks": cells})
    return result | {"rows": rows}
