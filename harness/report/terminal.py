"""The final report on a terminal, at any width and without one.

Nothing that matters is cut: long texts wrap, replay lines do not wrap at all, and whatever is left out is counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moe_harness.harness.report.results import Result, completed, verdict_of
from moe_harness.harness.report.words import (
    LABEL_WIDTH,
    axis_summary,
    by_check,
    cell,
    cluster_lines,
    details,
    facts,
    left_out,
    number,
    power_summary,
    words_told,
    worth_showing,
)

STYLES = {
    "pass": "bold green",
    "partly": "bold yellow",
    "fail": "bold red",
    "error": "bold red",
    "unsupported": "bold yellow",
    "skipped": "yellow",
    "none": "dim",
}


SHOWN_CLUSTERS = 5
WHOLE = 0.995  # share of the planned cases from which a pass is told without it


class Unwrapped(str):
    """A line that stays one line, so that it can be copied whole from any terminal, file or log."""


def emit(console: Console, parts: Iterable[Any]) -> None:
    """Print the parts; rich would cut an unwrapped line at the console's width, so those are printed past it."""
    for part in parts:
        if isinstance(part, Unwrapped):
            console.print(Text(part), soft_wrap=True)
        else:
            console.print(part)


def print_report(results: Sequence[Result], console: Console | None = None) -> None:
    """Everything a run found: each implementation in full, then several side by side, then the verdicts."""
    console = console or Console()
    full = [completed(result) for result in results]
    if not full:
        console.print(Text("error: nothing was judged", style=STYLES["error"]))
    for index, result in enumerate(full):
        emit(console, report(result, before=full[:index]))
    if len(full) > 1:
        console.print(Rule("side by side", align="left", style="dim"))
        emit(console, matrix(full, console.width))


def report(result: dict[str, Any], before: Sequence[dict[str, Any]] = ()) -> Iterator[Any]:
    """One implementation's report, verdict last, where the eye is when the run ends.

    What is the same for one reported `before` it is not repeated.
    """
    yield Rule(Text(result["impl"], style="bold"), align="left", style="dim")
    yield from clusters(result["clusters"])
    yield from failures(result["failures"])
    if result["checks"]:
        yield checks_table(result["checks"])
        yield Text("")
    known = {fact for other in before for fact in facts(other)}
    yield labelled([fact for fact in facts(result) if fact not in known])
    yield from ledger(result["coverage"], known_axes=[other["coverage"]["axes"] for other in before])
    yield from observations(result["observations"])
    yield Text("")
    yield from verdict(result)


def labelled(pairs: Sequence[tuple[str, str]], style: str = "dim") -> Table:
    """Label and text in two columns; the text wraps under itself."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style=style, min_width=LABEL_WIDTH, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(Text(label), Text(text))
    return grid


def failure_block(failure: dict[str, Any]) -> Iterator[Any]:
    """One failure: the message, everything known about it, and the line that repeats it."""
    title = Text.assemble(("FAIL ", STYLES["fail"]), (f"{failure.get('check', '?')}: ", "bold"))
    yield title.append(str(failure.get("message", "")))
    if failure.get("case"):
        yield Unwrapped(f"  {'case':<{LABEL_WIDTH}} {failure['case']}")
    yield Padding(labelled(details(failure)), (0, 0, 0, 2))
    if failure.get("replay"):
        yield Text("  replay", style="dim")
        yield Unwrapped(failure["replay"])
    yield Text("")


def failures(found: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """A few failures of each check, as different as possible, each cause once, and how many more there are."""
    told: set[str] = set()
    for check, group in by_check(found).items():
        shown = worth_showing(group, told)
        told |= {words for failure in shown for words in words_told(failure)}
        for failure in shown:
            yield from failure_block(failure)
        if (sentence := left_out(check, group, shown)) is not None:
            yield Text(sentence + "\n", style="yellow")


def clusters(found: Sequence[Any]) -> Iterator[Any]:
    """What the failures come down to, each with its smallest case: read first."""
    for number_, each in enumerate(found[:SHOWN_CLUSTERS], 1):
        what, where = cluster_lines(each)
        yield Text.assemble((f"{number_}. ", "bold"), (what, STYLES["fail"]), f": {where}")
        yield Unwrapped(f"   {each['replay']}")
    if left := found[SHOWN_CLUSTERS:]:
        cases = sum(each["failed"] for each in left)
        yield Text(f"and {cases} cases in {len(left)} more clusters (--json and --html list every one)", style="yellow")
    if found:
        yield Text("")


def checks_table(checks: Sequence[Any]) -> Table:
    """One row per check; `worst` is the largest share of a bound that was used, above 1 it fails."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", show_footer=len(checks) > 1)
    total = {key: sum(check.get(key) or 0 for check in checks) for key in COUNTS}
    table.add_column("check", footer="total", overflow="fold")
    for key in COUNTS:
        table.add_column(key, justify="right", footer=number(total[key]), no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", footer=seconds(checks), no_wrap=True)
    for check in checks:
        style = STYLES[cell(check)[0]]
        counts = [Text(str(check.get(key) or 0), style="" if check.get(key) else "dim") for key in COUNTS]
        if check.get("failed"):
            counts[1].stylize(STYLES["fail"])
        worst = check.get("worst")
        table.add_row(Text(check["name"], style=style), *counts, number(worst), seconds([check]))
    return table


COUNTS = ("cases", "failed", "unsupported", "skipped")


def seconds(checks: Sequence[dict[str, Any]]) -> str:
    """Seconds of these checks together, one decimal."""
    return f"{sum(check.get('seconds') or 0.0 for check in checks):.1f}"


def ledger(coverage: dict[str, Any], known_axes: Sequence[dict[str, Any]] = ()) -> Iterator[Any]:
    """What was executed, each reason why something was not, and how the axes were covered."""
    lines = [("executed", f"{coverage['executed']} cases")]
    for entry in coverage["unsupported"]:
        lines.append(("unsupported", f"{entry['cases']} cases: {entry['reason']}  (e.g. {entry.get('example', '-')})"))
    for reason, entries in _by_reason(coverage["skipped"]).items():
        whats = ", ".join(entry["what"] for entry in entries)
        lines.append(("skipped", f"{sum(entry['cases'] for entry in entries)} cases: {whats}, {reason}"))
    lines += [("power", told)] if (told := power_summary(coverage["power"])) else []
    yield labelled(lines)
    if coverage["axes"] in known_axes:
        yield labelled([("covered", "the same values of every axis as above")])
    elif coverage["axes"]:
        yield labelled([("covered", "cases per value of each axis")])
        axes = [(axis, axis_summary(counts)) for axis, counts in coverage["axes"].items()]
        yield Padding(labelled(axes), (0, 0, 0, 2))


def _by_reason(skipped: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Checks that were skipped for one reason stand in one line."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for entry in skipped:
        alike.setdefault(entry["reason"], []).append(entry)
    return alike


def observations(found: Sequence[dict[str, str]]) -> Iterator[Any]:
    """What was seen but not judged."""
    if found:
        yield labelled([("observed", "not part of the verdict")])
        yield Padding(labelled([(entry["name"], entry["text"]) for entry in found]), (0, 0, 0, 2))


def verdict(result: dict[str, Any]) -> Iterator[Any]:
    """The verdict line, with the reason where it is not a pass, and a warning where the run was cut short."""
    name = verdict_of(result)  # type: ignore[arg-type]
    yield Text.assemble((name.upper(), STYLES[colour(result)]), f"  {result['impl']}  {verdict_reason(result)}")
    for told in result["not_judged"]:
        yield Text(told, style="yellow")
    if result["interrupted"]:
        yield Text("interrupted: only what is listed above was judged", style="yellow")
    yield Text("")


def colour(result: dict[str, Any]) -> str:
    """The verdict, or "partly" where it is a pass of less than what was planned."""
    name = verdict_of(result)  # type: ignore[arg-type]
    return "partly" if name == "pass" and (result.get("judged") or 1) < WHOLE else name


def verdict_reason(result: dict[str, Any]) -> str:
    """Why the verdict is what it is."""
    name, ran = verdict_of(result), result["coverage"]["executed"]  # type: ignore[arg-type]
    failed = [check["name"] for check in result["checks"] if check.get("failed")]
    if name == "fail":
        count = max(len(result["failures"]), sum(check.get("failed", 0) for check in result["checks"]))
        return f"{count} failures in {', '.join(failed) or ', '.join(by_check(result['failures']))}"
    if name == "error":
        return result["error"] or (f"interrupted after {ran} cases" if ran else "nothing was executed")
    if name == "unsupported":
        return result["error"] or "not all of the stage's core cases are supported in any dtype (listed above)"
    refused = sum(entry["cases"] for entry in result["coverage"]["unsupported"])
    share = result.get("judged")
    told = f"{ran} cases passed" + (f", {refused} unsupported (listed above)" if refused else "")
    return told + (f"; {100 * share:.0f} % of the planned cases were judged" if share and share < WHOLE else "")


def matrix(results: Sequence[dict[str, Any]], width: int) -> Iterator[Any]:
    """Checks by implementations; numbers with a legend head the columns where the names would not fit."""
    names = [result["impl"] for result in results]
    checks = list(dict.fromkeys(check["name"] for result in results for check in result["checks"]))
    heads = names
    if sum(max(len(name), 16) + 2 for name in names) + max(map(len, [*checks, "verdict"])) > width:
        heads = [f"[{index}]" for index in range(1, len(names) + 1)]
        for head, name in zip(heads, names, strict=True):
            yield Unwrapped(f"{head} {name}")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("check", overflow="fold")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for check in checks:
        found = [next((entry for entry in result["checks"] if entry["name"] == check), None) for result in results]
        table.add_row(Text(check), *(Text(text, style=STYLES[status]) for status, text in map(cell, found)))
    verdicts = [verdict_of(result) for result in results]  # type: ignore[arg-type]
    table.add_row(Text("verdict", style="bold"), *(Text(name.upper(), style=STYLES[name]) for name in verdicts))
    yield table
