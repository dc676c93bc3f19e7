"""The words of a failure: one home for the terminal, the page and pytest.

label      text
case       experts/T=33,H=64,...
where      token 5, expert [3, 1], column 17
bound      12.3 times the bound
looks like rows of expert 3 only; ratio to the reference 2.00
cause      gate_up_swapped: explains the output to 0.9 sigma
replay     (never wrapped or cut: it is there to be copied)
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

SHOWN_PER_CHECK = 2
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
    if cluster["condition"] is None:
        return what, f"{failed} cases; no values of up to three axes tell them from the {inside + outside} that pass"
    if cluster["condition"] == "always":
        return what, f"{failed} of {failed + inside} cases, whatever the axes"
    return what, f"{failed} of {failed + inside} cases with {cluster['condition']}, 0 of {outside} without"


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


def left_out(check: str, failures: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> str | None:
    """What is not shown of a check's failures, in one sentence; None when all are."""
    hidden = len(failures) - len(shown)
    if hidden <= 0:
        return None
    kinds = {signature(failure) for failure in shown}
    alike = sum(signature(failure) in kinds for failure in failures) - len(shown)
    look = "all of them look" if alike == hidden else f"{alike} of them look" if alike else "none of them looks"
    return f"and {hidden} more in {check}; {look} like one shown here (--json and --html list every one)"
