"""A picture over many runs: each time as a multiple of its run's floor, each accuracy and share of checks that passed,
and a cross where a run failed."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.record.line import Line

LABELS = 7  # of dates that are written out, however many runs there are


class Point(NamedTuple):
    """One run: when, its value, and whether it failed."""

    when: str
    value: float
    failed: bool


Series = dict[str, list[Point]]


def series(lines: Iterable[Line]) -> tuple[Series, Series]:
    """Times over the floor, and shares of right answers or of judged checks that passed, in the order of recording."""
    times: Series = {}
    shares: Series = {}
    for line in lines:
        for case, time in line.get("times", {}).items():
            value = statistics.median(time["rounds"]) / (time["floor"] or 1.0)
            times.setdefault(f"{line['name']}, {case}", []).append(Point(line["recorded"], value, False))
        documents, verdicts = line.get("documents"), [v["verdict"] for v in line.get("verdicts", {}).values()]
        judged = [verdict for verdict in verdicts if verdict != "unsupported"]
        if documents:
            share = sum(row["right"] for row in documents) / len(documents)
        elif judged and not line.get("times"):
            share = judged.count("pass") / len(judged)
        else:
            continue
        point = Point(line["recorded"], share, "fail" in judged)
        shares.setdefault(f"{line['kind']} {line['name']}", []).append(point)
    return times, shares


def draw(lines: Iterable[Line], path: Path) -> None:
    """Write the picture, SVG or PNG by the name; CannotJudge without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise CannotJudge("a picture needs matplotlib: pip install matplotlib") from error
    both = [
        (found, label)
        for found, label in zip(series(lines), ("times of the floor", "right or passed"), strict=True)
        if found
    ]
    heights = [max(2.4, 0.8 + 0.16 * len(found)) for found, _ in both]  # a line of the legend takes 0.16 inches
    figure, axes = pyplot.subplots(
        len(both), 1, figsize=(12, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for (found, label), axis in zip(both, axes[:, 0], strict=True):
        when = sorted({point.when for points in found.values() for point in points})
        for name, points in found.items():
            axis.plot([when.index(p.when) for p in points], [p.value for p in points], "o-", markersize=3, label=name)
        lost = [point for points in found.values() for point in points if point.failed]
        axis.plot([when.index(p.when) for p in lost], [p.value for p in lost], "rx", markersize=9,
                  label="failed" if lost else None)  # fmt: skip
        labelled = range(0, len(when), -(-len(when) // LABELS))
        axis.set_xticks(labelled, [when[at][:16].replace("T", "\n") for at in labelled], fontsize=7)
        axis.set_ylabel(label)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)
    pyplot.close(figure)
