"""Bench reports as a table and as a picture."""

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from moe_harness.harness.bench.timing import BenchReport, Timing


def table(report: BenchReport) -> Table:
    """One row per number of tokens and implementation: time, spread, ratio to the first, time over floor, and the time
    of a call without a graph."""
    out = Table(box=box.SIMPLE, padding=(0, 0, 0, 1), title=report.title, caption=ceilings(report))
    for name in ("tokens", "", "time us", "spread", "/first", "/floor", "of floor", "called us"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("bound by", no_wrap=True)
    numbers = {spec: n for n, spec in enumerate(dict.fromkeys(t.spec for t in report.timings), 1)}
    for tokens in dict.fromkeys(t.tokens for t in report.timings):
        rows = [t for t in report.timings if t.tokens == tokens]
        for timing in rows:
            shown = str(tokens) if timing is rows[0] else ""
            out.add_row(shown, f"[{numbers[timing.spec]}]", *_cells(timing, rows[0]))
    return out


def legend(report: BenchReport) -> str:
    """The implementations by the numbers that the table gives them."""
    specs = dict.fromkeys(t.spec for t in report.timings)
    return "\n".join(f"[{n}] {spec}" for n, spec in enumerate(specs, 1))


def ceilings(report: BenchReport) -> str:
    """What this machine reached in the same run."""
    fp8 = f", of fp8 {report.fp8_rate / 1e6:.0f}" if report.fp8_rate else ""
    return (
        f"ceilings of this run: copy {report.copy_bandwidth / 1e6:.2f} TB/s, "
        f"product {report.matrix_rate / 1e6:.0f} TFLOP/s{fp8}, launch {report.launch:.2f} us"
    )


def remarks(report: BenchReport) -> list[str]:
    """What was timed call by call, and what was not timed and why."""
    told = []
    for spec in dict.fromkeys(t.spec for t in report.timings):
        own = [t for t in report.timings if t.spec == spec]
        eager = [t.tokens for t in own if t.median and not t.captured]
        if eager:
            told.append(f"{spec} was not captured in a graph but timed call by call at {_listed(eager)} tokens")
        for reason in dict.fromkeys(t.refused.split(". ")[0] for t in own if t.refused):
            at = [t.tokens for t in own if t.refused.startswith(reason)]
            told.append(f"{spec} was not timed at {_listed(at)} tokens: it {reason}")
    return told


def _listed(tokens: list[int]) -> str:
    return f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 2 else " and ".join(map(str, tokens))


def _cells(timing: Timing, first: Timing) -> list[str]:
    if timing.refused:
        return ["-"]
    first_ratio = f"{timing.median / first.median:.2f}" if first.median else "-"
    over = timing.median / timing.floor
    spread = f"{timing.low:.1f}..{timing.high:.1f}"
    return [
        f"{timing.median:.1f}",
        spread,
        first_ratio,
        f"{over:.2f}",
        f"{1 / over:.0%}",
        f"{timing.called:.1f}",
        timing.bound_by,
    ]


def picture(report: BenchReport, path: Path) -> None:
    """Time against tokens with the floor, and the roofline, side by side.  Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "moe-harness"  # equal figures give equal files
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    timed = [t for t in report.timings if not t.refused]
    floors = sorted({(t.tokens, t.floor) for t in timed})
    left.plot([f[0] for f in floors], [f[1] for f in floors], "k--", label="floor")
    for spec in dict.fromkeys(t.spec for t in timed):
        own = [t for t in timed if t.spec == spec]
        left.plot([t.tokens for t in own], [t.median for t in own], marker="o", label=spec)
        right.plot([t.intensity for t in own], [t.tflops for t in own], marker="o", linestyle="", label=spec)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title="time")
    _roofline(right, report, [t.intensity for t in timed if t.intensity])
    left.legend()
    right.legend()
    figure.suptitle(report.title)
    undated: Any = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=120, metadata=undated)


def _roofline(axes: Any, report: BenchReport, seen: list[float]) -> None:
    """The two ceilings over the intensities that were seen."""
    low, high = (min(seen) / 2, max(seen) * 2) if seen else (0.1, 1000.0)
    steps = [low * (high / low) ** (i / 64) for i in range(65)]
    ceiling = [min(report.copy_bandwidth * i, report.matrix_rate) / 1e6 for i in steps]
    axes.plot(steps, ceiling, "k--", label="ceilings")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="roofline")
