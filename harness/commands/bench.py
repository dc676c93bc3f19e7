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
    from rich.console import Console

    from fixtures.configs import names, shape
    from harness import bench as library
    from harness.bench_view import table

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
    Console().print(table(report))
    if json is not None:
        json.write_text(report.as_json())
    if picture is not None:
        _draw(report, picture)
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


def _draw(report: Any, path: Path) -> None:
    from harness.bench_view import picture

    try:
        picture(report, path)
    except ImportError as error:
        raise CannotJudge("a picture needs matplotlib: pip install matplotlib") from error
