"""`moe-harness audit TEST`: which wrong outputs would somebody else's test accept?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.registry import needed_part, stages_with

if TYPE_CHECKING:
    from rich.console import Console


def audit(
    tests: Annotated[
        list[str], typer.Argument(metavar="TEST...", help="A TOML, JSON or YAML file, or a built-in name.")
    ],
    json: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Run the standard wrong outputs through a tolerance rule on its own shapes and input scales.

    Built in: vllm, sglang, liger, flashinfer, flash-attention, deepgemm, torch-testing-bf16; `all` runs each of them.
    """
    from json import dumps

    from rich.console import Console

    from moe_harness.harness.proof import audit as auditing

    options.writable(json)
    names = list(auditing.builtin()) if tests == ["all"] else options.listed(tests)
    described = [auditing.read(test) for test in names]
    console = Console()
    results = []
    for one in described:
        results.append(auditing.run(one))
        show(results[-1], console)
    if json is not None:
        json.write_text(dumps(results, indent=1) + "\n", encoding="utf-8")


def show(result: dict[str, Any], console: "Console") -> None:
    """One test: a row per wrong output, a column per shape, and a right kernel below."""
    from rich.table import Table

    rule = ", ".join(f"{name} {value}" for name, value in result["rule"].items() if name != "kind")
    console.print(f"[bold]{result['name']}[/]: {result['rule']['kind']}, {rule}; {result['dtype']}", highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("wrong output")
    for entry in result["shapes"]:
        sizes = {name: size for name, size in entry["shape"].items() if name != "inputs"}
        own = sizes | entry["shape"].get("inputs", {})
        table.add_column("\n".join(f"{name}={value}" for name, value in own.items()), justify="right")
    for name in _names(result["shapes"]):
        table.add_row(name, *(_verdict(entry, name) for entry in result["shapes"]))
    counts = (f"{len(e['accepted'])} of {len(e['accepted']) + len(e['rejected'])}" for e in result["shapes"])
    table.add_row("[bold]accepted", *(f"[bold]{count}" for count in counts))
    right = ("passes" if entry["right_passes"] else "[red]fails" for entry in result["shapes"])
    table.add_row("a right kernel, one rounding", *right)
    console.print(table)
    for line in (result["note"].strip(), *result["source"]):
        if line:
            console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)
    console.print()


def _names(shapes: list[dict[str, Any]]) -> list[str]:
    """Every wrong output of any shape, in the order that their stage gives them."""
    known = [name for stage in stages_with("wrong") for name in needed_part(stage, "wrong").NAMES]
    seen = {name for entry in shapes for name in entry["accepted"] + entry["rejected"]}
    return [name for name in dict.fromkeys(known) if name in seen]


def _verdict(entry: dict[str, Any], name: str) -> str:
    if name in entry["accepted"]:
        return "[red]accepts"
    return "rejects" if name in entry["rejected"] else ""
