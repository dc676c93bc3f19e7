"""A picture over many runs: each time as a multiple of its run's floor, each accuracy, and where a verdict was lost."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.record.line import Line

Series = dict[str, list[tuple[str, float]]]


def series(lines: Iterable[Line]) -> tuple[Series, Series]:
    """Times over the floor and shares of passed cases or right answers, by result and in the order of recording."""
    times: Series = {}
    shares: Series = {}
    for line in lines:
        for case, time in line.get("times", {}).items():
            value = statistics.median(time["rounds"]) / (time["floor"] or 1.0)
            times.setdefault(f"{line['name']}, {case}", []).append((line["recorded"], value))
        documents, verdicts = line.get("documents"), line.get("verdicts", {})
        if documents:
            share = sum(row["right"] for row in documents) / len(documents)
        elif verdicts:
            share = sum(v["verdict"] == "pass" for v in verdicts.values()) / len(verdicts)
        else:
            continue
        shares.setdefault(f"{line['kind']} {line['name']}", []).append((line["recorded"], share))
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
        (found, label) for found, label in zip(series(lines), ("times of the floor", "passed"), strict=True) if found
    ]
    figure, axes = pyplot.subplots(len(both), 1, figsize=(9, 3.6 * len(both)), squeeze=False, layout="constrained")
    for (found, label), axis in zip(both, axes[:, 0], strict=True):
        when = sorted({at for points in found.values() for at, _ in points})
        for name, points in found.items():
            axis.plot([when.index(at) for at, _ in points], [value for _, value in points], "o-", label=name)
        axis.set_xticks(range(len(when)), [at[:16].replace("T", "\n") for at in when], fontsize=7)
        axis.set_ylabel(label)
        axis.legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
