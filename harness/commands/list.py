"""`moe-harness list`: the registered implementations of each stage, its signature and checks, and the models."""

import inspect
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core import contracts, registry
from moe_harness.harness.core.ranked_stage import find_ranked


def list_(
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            "-s",
            help="Only these stages.",
            autocompletion=options.starting_with(lambda: options.ALL_STAGES),
        ),
    ] = None,
) -> None:
    """Print the implementations, the signature and the checks of each stage, and the models of --config."""
    from rich.console import Console
    from rich.text import Text

    from moe_harness.fixtures.configs import names
    from moe_harness.harness.core.plan import Request

    console = Console()
    asked = [options.one_of("stage", name, options.ALL_STAGES) for name in options.listed(stage)]
    for name in asked or options.ALL_STAGES:
        console.print(Text(signature(name), style="bold"), soft_wrap=True)
        console.print(_columns(registry.registered(name)))
        console.print(Text("  checks: " + ", ".join(options.known_checks(name, Request()))), style="dim")
        console.print()
    console.print("models for --config: " + ", ".join(names()))


def signature(stage: str) -> str:
    """The call of a stage on one line: names and defaults, without types."""
    if stage in contracts.RANK_STAGES:
        asked = find_ranked(stage)
        kind = "a function, called on every rank" if asked.is_function else "a class, one object per rank"
        return f"{stage}{asked.call}: {kind}"
    bare = contracts.SIGNATURES[stage]
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in bare.parameters.values()]
    return f"{stage}{bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty)}"


def _columns(registered: dict[str, str]) -> "object":
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, module in registered.items():
        table.add_row(name, f"[dim]{module}[/dim]")
    return table
