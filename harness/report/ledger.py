"""The words of the ledger: cells of the verdict matrix, and how an axis was covered."""

from typing import Any

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
