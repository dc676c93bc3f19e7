"""`moe-harness bisect`: the first layer at which a model goes wrong, its half, and what it does instead."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.commands.generate import TORCH_NAMES, ids_of, refusing
from moe_harness.harness.core import registry
from moe_harness.harness.core.errors import CannotJudge, UsageError


def bisect(
    model: Annotated[Path, typer.Option("--model", "-m", help="A Hugging Face folder: config.json, *.safetensors.")],
    impl: Annotated[str, typer.Option("--impl", "-i", help="What loads the model under suspicion.")],
    against: Annotated[str | None, typer.Option(help="Another one, judged beside it.")] = None,
    ids: Annotated[list[str] | None, typer.Option(help="Prompts as token ids, 1,2,3, of one length.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each random prompt, where no --ids are given.", min=1)] = 24,
    prompts: Annotated[int, typer.Option(help="Random prompts.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the prompts.", min=0)] = 0,
    device: options.Device = "cpu",
    dtype: Annotated[str, typer.Option(help="What it computes in: fp32, fp16, bf16.")] = "bf16",
    debug: options.Debug = False,
) -> None:
    """Run every layer alone on the reference's residual stream; the reference in fp64 says what is right."""
    import torch
    from rich.console import Console

    from moe_harness.harness.stages.model.bisect import Location
    from moe_harness.harness.stages.model.bisect import bisect as locate
    from moe_harness.harness.stages.model.folder import reference_of

    place, kind = options.device_here(device), options.one_dtype(dtype)
    reference = reference_of(model)
    asked = _prompts(ids, reference.config["vocab_size"], prompts, tokens, seed)
    torch_dtype, console = getattr(torch, TORCH_NAMES[kind]), Console(stderr=True)
    found: dict[str, Location] = {}
    for spec in dict.fromkeys(filter(None, (impl, against))):
        load = registry.find("model", spec)

        def run(load: Any = load, spec: str = spec) -> Location:
            loaded = load(str(model), device=place, dtype=torch_dtype)
            with console.status(f"{spec}: loaded") as status:

                def tell(judged: Any) -> None:
                    status.update(f"{spec}: layer {judged.layer} of {reference.layers}")

                return locate(loaded, reference, asked, torch_dtype, place, tell)

        found[spec] = refusing(run, debug)
    _print(found)
    raise typer.Exit(int(found[impl].first is not None))


def _prompts(ids: list[str] | None, vocabulary: int, count: int, length: int, seed: int) -> Any:
    import torch

    if ids is None:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocabulary, (count, length), generator=draw)
    rows = [ids_of(text) for text in ids]
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise UsageError(
            f"--ids have {[len(row) for row in rows]} tokens, but should have as many each, and at least 1"
        )
    if max(map(max, rows)) >= vocabulary or min(map(min, rows)) < 0:
        raise UsageError(f"--ids should hold token ids from 0 to {vocabulary - 1}")
    return torch.tensor(rows)


def _print(found: dict[str, Any]) -> None:
    """A table of layers, then what is wrong in words."""
    from rich.console import Console
    from rich.table import Table

    from moe_harness.harness.core.findings import MAX_Z

    table = Table(title=f"largest error of each layer in sigmas of what rounding may do; wrong above {MAX_Z:.1f}")
    table.add_column("layer", justify="right")
    for spec in found:
        table.add_column(spec, justify="right")
    table.add_column("judged", justify="right")
    for rows in zip(*(location.layers for location in found.values()), strict=True):
        marks = [f"[red]{row.worst:.3g} wrong[/red]" if row.wrong else f"{row.worst:.2f}" for row in rows]
        table.add_row(str(rows[0].layer), *marks, f"{rows[0].share:.0%}")
    console = Console()
    console.print(table)
    for spec, location in found.items():
        console.print(_words(spec, location), highlight=False, markup=False, soft_wrap=True)
    if min(row.share for location in found.values() for row in location.layers) == 0:
        raise CannotJudge("no position of some layer has a routing that rounding cannot change; try other prompts")


def _words(spec: str, location: Any) -> str:
    first = location.first
    if first is None:
        return f"{spec}: every layer is right within rounding"
    told = [f"{spec}: layer {first.layer} is the first wrong one"]
    wrong = [name for name, judged in location.halves.items() if judged.wrong]
    if wrong:
        told.append(f"its {' and its '.join(wrong)} half is wrong")
    elif location.halves:
        told.append("each of its halves alone is right: look between them")
    for what in location.explained:
        told.append(f"it does what this would do: {what}")
    others = [judged.layer for judged in location.layers if judged.wrong and judged is not first]
    told.append(f"wrong too: layers {others}" if others else "the layers after it are right")
    return "\n  ".join(told)
