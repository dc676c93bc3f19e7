"""`moe-harness bench --stage model`: output tokens/s of whole models and servers on one workload."""

from pathlib import Path

import typer

from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, EXIT_PASS, CannotJudge, UsageError


def bench_model(
    specs: list[str], model: Path | None, device: str, dtype: str, requests: int, lengths: tuple[str, str], runs: int,
    seed: int, json: Path | None, command: str,
) -> None:  # fmt: skip
    """Time models; ends with the command's exit status."""
    from moe_harness.harness.bench import serving
    from moe_harness.harness.core.environment import versions

    if model is None or not (model / "config.json").is_file():
        raise UsageError(f"--model is {model}, but --stage model needs a folder with config.json and safetensors")
    _require(device)
    workload = serving.Workload(requests, span("prompt-tokens", lengths[0]), span("new-tokens", lengths[1]), runs, seed)
    found = serving.bench(specs, model, workload, device=device, dtype=dtype, progress=_tell)
    _table(found)
    if json is not None:
        json.write_text(
            serving.as_json(found, workload, command=command, device=_named(device), dtype=dtype, versions=versions())
        )
    raise typer.Exit(EXIT_PASS if any(not timing.refused for timing in found) else EXIT_CANNOT_JUDGE)


def span(name: str, text: str) -> tuple[int, int]:
    """100-1024, or one number, as the least and the most.

    Raises:
        UsageError: anything else.
    """
    least, _, most = text.partition("-")
    try:
        found = (int(least), int(most or least))
    except ValueError:
        found = (0, 0)
    if not 0 < found[0] <= found[1]:
        raise UsageError(f"--{name} is {text!r}, but should be like 100-1024, or one positive number")
    return found


def _tell(text: str) -> None:
    typer.echo(text, err=True)


def _require(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise CannotJudge("nothing was timed: there is no CUDA device; --device cpu times on the processor")


def _named(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _table(found: list) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    table.add_column("model", overflow="fold", ratio=1)
    for column in ("tokens/s", "lowest", "highest", "x first", "same greedy", "load s", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    timed = [timing for timing in found if not timing.refused]
    for timing in timed:
        rates = timing.tokens_per_second
        table.add_row(
            timing.spec, f"{timing.median:,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}",
            f"{timing.median / timed[0].median:.2f}", f"{timing.agreement(timed[0]):.0%}",
            f"{timing.load_seconds:.1f}", f"{timing.peak_memory / 2**30:.1f}" if timing.peak_memory else "",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for timing in found:
        if timing.refused:
            console.print(f"{timing.spec} was not timed: {timing.refused}", highlight=False, markup=False)
