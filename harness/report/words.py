"""The words of a report: one home for the terminal, the page, pytest and GitHub.

A failure has these lines:

label      text
case       experts/T=33,H=64,...
where      token 5, expert [3, 1], column 17
bound      12.3 times the bound
looks like rows of expert 3 only; ratio to the reference 2.00
cause      gate_up_swapped: explains the output to 0.9 sigma
replay     (never wrapped or cut: it is there to be copied)
"""

import ast
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_harness.harness.report.results import Result, completed, verdict_of

SHOWN_PER_CHECK = 2
SHOWN_PARTS = 3  # of a cluster
LABEL_WIDTH = 11


def number(value: float | None) -> str:
    """A number with three significant digits, "-" where there is none."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"


def times_the_bound(headroom: float | None) -> str | None:
    """How far off, in words; None where no bound applies (a crash, or data on which only one result is right)."""
    if headroom is None or math.isinf(headroom):
        return None
    return "not comparable: NaN" if math.isnan(headroom) else f"{number(headroom)} times the bound"


def place(where: dict[str, Any] | None) -> str | None:
    """`token 5, expert [3, 1], column 17`, whatever the names are."""
    return ", ".join(f"{name} {value}" for name, value in (where or {}).items()) or None


def causes(failure: dict[str, Any]) -> str | None:
    """The faults that explain the output, best first, each with its evidence."""
    told = "; ".join(f"{entry['fault']}: {entry['evidence']}" for entry in failure.get("diagnosis") or [])
    return told or (f"none of the {failure['known']} known" if failure.get("known") else None)


def cluster_lines(cluster: dict[str, Any]) -> tuple[str, str]:
    """(what fails, where it fails) of a cluster, with the counts that tell how sure the condition is."""
    failed, inside, outside = (cluster[key] for key in ("failed", "passed", "passed_without"))
    what = cluster["cause"] or "; ".join(cluster["kinds"])
    if cluster.get("parts"):
        return what, f"{failed} cases: {_parts(cluster['parts'])}"
    if cluster["condition"] is None and failed == 1:
        return what, f"1 case; one beside the {inside + outside} that pass does not tell where it fails"
    if cluster["condition"] is None:
        return what, f"{failed} cases; no values of up to three axes tell them from the {inside + outside} that pass"
    if cluster["condition"] == "always":
        return what, f"{failed} of {failed + inside} cases, whatever the axes"
    return what, f"{failed} of {failed + inside} cases with {cluster['condition']}, 0 of {outside} without"


def _parts(parts: Sequence[dict[str, Any]]) -> str:
    """The largest parts with their conditions, and how many cases are left."""
    told = [part for part in parts if part["condition"] is not None][:SHOWN_PARTS]
    words = [f"{part['failed']} of {part['failed'] + part['passed']} with {part['condition']}" for part in told]
    left = sum(part["failed"] for part in parts) - sum(part["failed"] for part in told)
    return "; ".join([*words, f"{left} more"] if left else words)


def details(failure: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what is known beside the message, the case and the replay line."""
    found = {
        "where": place(failure.get("where")),
        "how far": times_the_bound(failure.get("headroom")),
        "looks like": "; ".join(failure.get("looks_like") or []) or None,
        "cause": causes(failure),
    }
    return [(label, text) for label, text in found.items() if text]


def failure_text(failure: dict[str, Any]) -> str:
    """The whole failure as plain text without wrapping, for pytest and logs."""
    lines = [f"{failure.get('check', '?')}: {failure.get('message', '')}"]
    known = [("case", failure.get("case", "?")), *details(failure)]
    lines += [f"  {label:<{LABEL_WIDTH}} {text}" for label, text in known]
    if failure.get("replay"):
        lines += ["  replay:", failure["replay"]]
    return "\n".join(lines)


def signature(failure: dict[str, Any]) -> tuple[Any, ...]:
    """Failures with equal signatures are likely one fault: same check, same best cause, same looks."""
    diagnosis = failure.get("diagnosis") or [{}]
    return failure.get("check"), diagnosis[0].get("fault"), tuple(failure.get("looks_like") or [])


def by_check(failures: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Failures under the name of their check, in the order in which they came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for failure in failures:
        groups.setdefault(failure.get("check", "?"), []).append(failure)
    return groups


def representatives(failures: Sequence[dict[str, Any]], most: int = SHOWN_PER_CHECK) -> list[dict[str, Any]]:
    """At most `most` of them in their order: first one of each signature, then the earliest of the rest."""
    first_of_kind = list({signature(failure): index for index, failure in reversed(list(enumerate(failures)))}.values())
    rest = [index for index in range(len(failures)) if index not in set(first_of_kind)]
    chosen = (sorted(first_of_kind) + rest)[:most]
    return [failures[index] for index in sorted(chosen)]


def best_cause(failure: dict[str, Any]) -> str | None:
    """The best cause of a failure, None where it has none or was not asked for it."""
    return next((entry["fault"] for entry in failure.get("diagnosis") or []), None)


def was_asked(failure: dict[str, Any]) -> bool:
    """Whether its cause was looked for."""
    return bool(failure.get("diagnosis") or failure.get("known"))


def worth_showing(failures: Sequence[dict[str, Any]], told: set[str]) -> list[dict[str, Any]]:
    """Representatives of a check's failures less what is `told` of the run by now, names of causes and messages.

    Of a check that has a cause, failures that were not asked for theirs add nothing; of one that has none, where others
    had, one is enough.  What has no place, a crash say, is never asked, and shown.
    """
    most = 1 if told and not any(map(was_asked, failures)) else SHOWN_PER_CHECK
    if any(map(best_cause, failures)):
        failures = [failure for failure in failures if was_asked(failure) or not failure.get("where")]
        most = min(most, len(set(map(signature, failures))))
    untold = [failure for failure in failures if (best_cause(failure) or failure.get("message")) not in told]
    return representatives(untold, most)


def words_told(failure: dict[str, Any]) -> set[str]:
    """What is told once a failure is shown: its message and its cause."""
    return {str(failure.get("message")), *filter(None, [best_cause(failure)])}


def left_out(check: str, failures: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> str | None:
    """What is not shown of a check's failures, in one sentence; None when all are."""
    hidden = len(failures) - len(shown)
    if hidden <= 0:
        return None
    kinds = {signature(failure) for failure in shown}
    alike = sum(signature(failure) in kinds for failure in failures) - len(shown)
    look = "all of them look" if alike == hidden else f"{alike} of them look" if alike else "none of them looks"
    cause = next(filter(None, map(best_cause, failures)), None)
    if alike < hidden and cause is not None:
        told = f", {cause} among them"
    else:
        told = f"; {look} like one shown here" if shown else ", as shown above"
    return f"{'and ' if shown else ''}{hidden} more in {check}{told} (--json and --html list every one)"


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


AXIS_VALUES_SHOWN = 12


def cell(check: dict[str, Any] | None) -> tuple[str, str]:
    """(status, text) of one check on one implementation; status is fail, pass, partly, unsupported, skipped or none.

    "partly" passed what was judged, and not all was.
    """
    if check is None:
        return "none", "not run"
    cases, failed = check.get("cases", 0), check.get("failed", 0)
    unsupported, skipped = check.get("unsupported", 0), check.get("skipped", 0)
    ran = max(failed, cases - unsupported - skipped)
    refused = (f", {unsupported} unsupported" if unsupported else "") + (f", {skipped} skipped" if skipped else "")
    if failed:
        return "fail", f"{failed} of {ran} failed{refused}"
    if ran > 0:
        return "partly" if refused else "pass", f"{ran} passed{refused}"
    if unsupported:
        return "unsupported", f"{unsupported} unsupported"
    return ("skipped", f"{skipped} skipped") if skipped else ("none", "no cases")


def power_summary(power: dict[str, Any]) -> str | None:
    """How many data sets were proved to tell right from wrong, and how many had to be replaced for that."""
    if not power["proved"]:
        return None
    told = f"on {power['proved']} data sets every standard wrong output is rejected"
    replaced = power["replaced"]
    return f"{told}; powerless data sets replaced: {len(replaced)}" if replaced else told


def axis_summary(counts: dict[str, int]) -> str:
    """`fp32: 200, bf16: 200`; of an axis with many values only how many, and the rarest."""
    if len(counts) <= AXIS_VALUES_SHOWN:
        return ", ".join(f"{value}: {cases}" for value, cases in counts.items())
    rarest = min(counts, key=lambda value: counts[value])
    first, last = min(counts, key=_order), max(counts, key=_order)
    return f"{len(counts)} values from {first} to {last}; the rarest, {rarest}, in {counts[rarest]} cases"


def _order(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what was judged under which conditions: device, dtypes, seed, versions, declarations."""
    versions = [f"{name} {version or 'absent'}" for name, version in result["versions"].items()]
    declared = [f"{name} {_plain(value)}" for name, value in result["declared"].items() if value not in (None, False)]
    found = {
        "stage": result["stage"],
        "device": result.get("device"),
        "dtypes": ", ".join(result["dtypes"]),
        "profile": result.get("profile"),
        "config": result.get("config"),
        "seed": result.get("seed"),
        "time": f"{result['seconds']:.1f} s" if result.get("seconds") is not None else None,
        "declared": "; ".join(declared) or ("nothing" if result["declared"] else None),
        "versions": ", ".join(versions),
    }
    return [(label, str(text)) for label, text in found.items() if text not in (None, "")]


def _plain(value: Any) -> str:
    if value is True:
        return "yes"
    return (", ".join(map(str, value)) or "nothing") if isinstance(value, list | tuple | set) else str(value)
