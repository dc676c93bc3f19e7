"""The matrix of the gate as a Markdown page: what each measure sees of each fault that the model can show."""

from collections.abc import Iterator
from typing import Any

PLACES = {"all_layers": "in all layers", "one_layer": "in one layer"}
COLLAPSE = 0.25  # accuracy below which a run is told as a collapse


def page(result: dict[str, Any]) -> str:
    """The page of a result of `gate_matrix`."""
    return "\n".join([
        "# What the gate sees of the catalogue", "",
        "Written by `python -m moe_harness.harness.proof.gate_matrix`, whose text says how it is measured; the numbers",
        "lie in [gate_matrix_held_out.json](gate_matrix_held_out.json). Nats are those of a whole worked answer.", "",
        *_summary(result), "", *_at_equal_cost(result), "", *_faults(result), "", *_absent(result), "",
    ])  # fmt: skip


def _summary(result: dict[str, Any]) -> Iterator[str]:
    cost, seen = result["cost"], result["seen"]
    tried = sum(row["kind"] == "fault" and row["layer"] is None for row in result["rows"])
    yield (
        f"{tried} of the {result['planned']} faults of the stages experts and moe_block were run. "
        f"{result['documents']} questions under teacher forcing, {result['generated']} answered by generation, "
        f"{result['identity']['dtype']} on {result['identity']['device']}. A question costs "
        f"{1000 * cost['forced']:.0f} ms of the processor forced and {1000 * cost['generated']:.0f} ms generated."
    )
    yield ""
    yield "| | faults that ran | present | seen by accuracy | by gold log-likelihood | by neither | by kernel checks |"
    yield "|---|---|---|---|---|---|---|"
    for place, name in PLACES.items():
        n = seen[place]
        cells = [n[key] for key in ("faults", "present", "by_accuracy", "by_gold", "by_neither", "by_checks")]
        yield f"| {name} | {' | '.join(map(str, cells))} |"
    alarms = sum(seen[place]["false_alarms"] for place in PLACES)
    yield ""
    yield f"Right implementations that ran: {sum(seen[p]['right'] for p in PLACES)}; false alarms: {alarms}."


def _at_equal_cost(result: dict[str, Any]) -> Iterator[str]:
    """The gold log-likelihood as it was measured, against the accuracy of fewer questions, drawn from those it has."""
    from moe_harness.harness.proof.gate_matrix import expected_by_accuracy

    cost, forced, generated = result["cost"], result["documents"], result["generated"]
    yield "## At equal cost"
    yield ""
    same = forced * cost["forced"] / cost["generated"]
    yield (
        f"{forced} forced questions cost what {same:.1f} generated ones do. What the accuracy would see "
        "with so many of its questions, the mean over all draws, beside what the gold "
        f"log-likelihood sees with {forced}:"
    )
    yield ""
    names = [name for place in PLACES.values() for name in (f"accuracy, {place}", "gold over it")]
    yield f"| generated | cost of so many forced | {' | '.join(names)} |"
    yield "|---|---|---|---|---|---|"
    rows = [row for row in result["rows"] if row["kind"] == "fault" and "error" not in row]
    parts = {place: [r for r in rows if (r["layer"] is None) == (place == "all_layers")] for place in PLACES}
    for drawn in range(3, generated + 1):
        cells = [str(drawn), f"{drawn * cost['generated'] / cost['forced']:.0f}"]
        for place, here in parts.items():
            seen = expected_by_accuracy(here, drawn, generated)
            cells += [f"{seen:.1f}", f"{result['seen'][place]['by_gold'] / seen:.1f}" if seen else "-"]
        yield f"| {' | '.join(cells)} |"


def _faults(result: dict[str, Any]) -> Iterator[str]:
    yield "## Faults whose numbers differ from every right implementation's"
    yield ""
    yield "| fault | accuracy, all layers | nats | seen by | accuracy, one layer | nats | seen by | kernel checks |"
    yield "|---|---|---|---|---|---|---|---|"
    rows = [row for row in result["rows"] if row["kind"] == "fault"]
    by_place = {name: {row["name"]: row for row in rows if (row["layer"] is None) == whole}
                for name, whole in (("all", True), ("one", False))}  # fmt: skip
    names = dict.fromkeys(row["name"] for row in rows if row.get("present"))
    for name in sorted(names, key=lambda name: _order(by_place["all"].get(name), by_place["one"].get(name))):
        both = [by_place[place].get(name) for place in ("all", "one")]
        checks = next((row["checks"] for row in both if row and row["checks"]), None)
        cells = [cell for row in both for cell in _cells(row)]
        yield f"| `{name}` | {' | '.join(cells)} | {', '.join(checks[:3]) if checks else '-'} |"


def _order(everywhere: dict[str, Any] | None, alone: dict[str, Any] | None) -> tuple[float, float]:
    """Those that cost the most first."""
    found = [row for row in (everywhere, alone) if row and "error" not in row]
    return (min((row["accuracy"] for row in found), default=2.0),
            min((row["gold"] if row["gold"] is not None else float("-inf") for row in found), default=0.0))  # fmt: skip


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["not run", "", ""]
    if "error" in row:
        return [row["error"].split(":")[0], "", ""]
    gold = "not finite" if row["gold"] is None else f"{row['gold']:+.2g}"
    told = [name for name, key in (("accuracy", "by_accuracy"), ("gold", "by_gold")) if row[key]]
    accuracy = f"**{row['accuracy']:.0%}**" if row["accuracy"] < COLLAPSE else f"{row['accuracy']:.0%}"
    return [accuracy, gold, ", ".join(told) or ("-" if row["present"] else "absent")]


def _absent(result: dict[str, Any]) -> Iterator[str]:
    yield "## Faults that the model does not show"
    yield ""
    rows = [row for row in result["rows"] if row["kind"] == "fault"]
    shown = {row["name"] for row in rows if row.get("present")}
    raised = {row["name"] for row in rows if "error" in row} - shown
    absent = sorted({row["name"] for row in rows if row.get("present") is False} - shown)
    yield (
        f"{len(absent)} equal a right implementation in every bit, wherever they are planted: they need another T, "
        "other strides, an expert map, a NaN, k = E, a shared expert, or a config that this family does not have. Of "
        f"these the kernel checks kill {sum(bool(_checks(rows, name)) for name in absent)}."
    )
    yield ""
    yield ", ".join(f"`{name}`" for name in absent)
    if raised:
        yield ""
        yield f"{len(raised)} raised or came to no end: " + ", ".join(f"`{name}`" for name in sorted(raised))


def _checks(rows: list[dict[str, Any]], name: str) -> list[str]:
    return next((row["checks"] or [] for row in rows if row["name"] == name), [])
