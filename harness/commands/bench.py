"""`moe-harness bench`: time implementations side by side against the floor, in one run on one GPU."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.errors import EXIT_CANNOT_JUDGE, EXIT_PASS, CannotJudge, UsageError, unknown

TOKENS = "1,8,32,64,128,256,512,1024,4096,16384"
STAGES = ("experts", "router", "grouped_linear", "shared_expert_gate")


def bench(
    stage: Annotated[str, typer.Option("--stage", "-s", help=", ".join(STAGES))],
    impl: Annotated[list[str], typer.Option("--impl", "-i", help="What is timed; ratios are to the first.")],
    config: Annotated[str, typer.Option(help="The released model whose shapes are used.")] = "qwen3-30b-a3b",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = TOKENS,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    ep_size: Annotated[int, typer.Option(help="Time one rank's part of the experts under EP of this size.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; the median and the spread are over these.", min=3)] = 11,
    seed: Annotated[int, typer.Option(help="Other data.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Write roofline and times here, PNG or SVG.")
    ] = None,
) -> None:
    """Time implementations of a stage; one that is not right on the timed data is not timed."""
    from fixtures.configs import names, shape
    from harness import bench as library

    if stage not in STAGES:
        raise unknown("stage", stage, list(STAGES))
    if config not in names():
        raise unknown("config", config, names())
    counts = _counts(tokens)
    model = shape(config)
    local = model.num_experts // ep_size if ep_size > 1 else None
    command = "moe-harness " + shlex.join(sys.argv[1:])
    try:
        report = library.bench(
            stage, impl, library.Shape.of(model, local_experts=local), counts, dtype=dtype, rounds=rounds, seed=seed,
            command=command, progress=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    except RuntimeError as error:
        raise CannotJudge(f"nothing was timed: {error}") from error
    show(report)
    if json is not None:
        json.write_text(report.as_json())
    if picture is not None:
        draw(report, picture)
    timed = any(not timing.refused for timing in report.timings)
    raise typer.Exit(EXIT_PASS if timed else EXIT_CANNOT_JUDGE)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--tokens is {text!r}, but should be positive numbers such as 1,64,1024")
    return counts


def show(report: Any) -> None:
    """A table: microseconds with their spread, the ratio to the first implementation, the share of the floor."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.stage}, {report.shape.name}, {report.dtype}, {report.device}", title_justify="left")
    for head in ("tokens", "implementation", "µs", "spread", "to first", "over floor", "bound by", "graph"):
        table.add_column(head, justify="left" if head in ("implementation", "bound by") else "right")
    first: dict[int, float] = {}
    for timing in report.timings:
        if timing.refused:
            table.add_row(str(timing.tokens), timing.spec, "-", "", "", "", timing.refused, "")
            continue
        first.setdefault(timing.tokens, timing.median)
        table.add_row(
            str(timing.tokens), timing.spec, f"{timing.median:.1f}", f"{timing.low:.1f} to {timing.high:.1f}",
            f"{timing.median / first[timing.tokens]:.2f}", f"{timing.median / timing.floor:.2f}", timing.bound_by,
            "yes" if timing.captured else "no",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"copy {report.copy_bandwidth / 1e6:.2f} TB/s, product {report.matrix_rate / 1e6:.0f} TFLOP/s, "
                  "measured in this run")  # fmt: skip


def draw(report: Any, path: Path) -> None:
    """Time against tokens beside the roofline, as PNG or SVG by the file's ending."""
    try:
        import matplotlib
    except ImportError as error:
        raise CannotJudge("a picture needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, roof) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    timed = [timing for timing in report.timings if not timing.refused]
    for spec in dict.fromkeys(timing.spec for timing in timed):
        own = [timing for timing in timed if timing.spec == spec]
        times.plot([t.tokens for t in own], [t.median for t in own], marker="o", markersize=3, label=spec)
        roof.plot([t.intensity for t in own], [t.tflops for t in own], marker="o", markersize=3, label=spec)
    floors = {timing.tokens: timing.floor for timing in timed}
    times.plot(list(floors), list(floors.values()), color="black", linestyle="--", label="floor")
    span = [t.intensity for t in timed] or [1.0, 1000.0]
    ceiling = [min(report.matrix_rate, x * report.copy_bandwidth) / 1e6 for x in sorted(span)]
    roof.plot(sorted(span), ceiling, color="black", linestyle="--", label="roofline")
    for axes, below, beside in ((times, "tokens", "µs per call"), (roof, "operations per byte", "TFLOP/s")):
        axes.set(xscale="log", yscale="log", xlabel=below, ylabel=beside)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"{report.stage}, {report.shape.name}, {report.dtype}, {report.device}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
