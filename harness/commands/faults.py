"""`moe-harness faults`: prove that the checks can fail, by running all of them against every fault of the catalogue."""

from pathlib import Path
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core import contracts
from moe_harness.harness.core.errors import EXIT_FAIL, unknown


def faults(
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            "-s",
            help="Only the faults of this stage.",
            autocompletion=options.starting_with(lambda: options.ALL_STAGES),
        ),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option("--fault", help="Only these faults.", autocompletion=options.starting_with(options.fault_names)),
    ] = None,
    device: options.Device = "cpu",
    json: Annotated[Path | None, typer.Option("--json", help="Write the matrix here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write an SVG here, its data beside it.")] = None,
    jobs: Annotated[int, typer.Option(help="Faults judged at a time; 0: one per core.", min=0)] = 0,
    shard: Annotated[
        str | None, typer.Option("--shard", help="Only this share of them: 2/5 is the second of five.")
    ] = None,
    known: Annotated[
        list[str] | None, typer.Option("--known", help="What --json wrote before, complete or not: not judged again.")
    ] = None,
    seed: options.Seed = 0,
) -> None:
    """Run every check against every fault and print who kills it.  A survivor fails the command."""
    from rich.console import Console
    from rich.progress import Progress

    from moe_harness.harness.core.catalogue import all_faults
    from moe_harness.harness.core.plan import Request
    from moe_harness.harness.proof import kill_matrix, kill_matrix_view, parts

    for path in (json, html, picture):
        options.writable(path)
    chosen = _chosen(stage, options.listed(fault))
    device = options.one_of("device", device, contracts.DEVICES)
    judging = kill_matrix.MatrixOptions(Request(device=device, seed=seed), 1 if device == "cuda" else jobs)
    earlier = parts.read([Path(path) for path in options.listed(known)], judging)
    done = {row["fault"] for part in earlier for row in part["rows"]}
    share = [fault for fault in (parts.share(chosen, shard) if shard else chosen) if fault.name not in done]
    kept = parts.Kept(json, judging, earlier, chosen)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("faults", total=len(share))

        def heard(row: dict) -> None:
            kept.add(row)
            progress.advance(bar)

        kill_matrix.run(share, judging, heard)
    result = kept.matrix()
    kill_matrix_view.print_matrix(result, Console())
    if json is not None:
        kill_matrix_view.write_json(result, json)
    if html is not None:
        kill_matrix_view.write_html(result, html)
    if picture is not None:
        kill_matrix_view.write_picture(result, picture)
        kill_matrix_view.write_json(kill_matrix_view.picture_facts(result), picture.with_suffix(".json"))
    whole = len(result["rows"]) == len(all_faults())
    useless = kill_matrix.unjustified(result) if whole else []
    for name in useless:
        print(f"the check {name} is the first killer of no fault and has no justification")
    raise typer.Exit(EXIT_FAIL if result["survivors"] or result["thin"] or useless else 0)


def _chosen(stage: str | None, names: tuple[str, ...] | None) -> list:
    from moe_harness.harness.core.catalogue import STAGES_WITH_FAULTS, all_faults

    found = all_faults(contracts.check_stage(stage, STAGES_WITH_FAULTS) if stage else None)
    known = [entry.name for entry in found]
    for name in names or ():
        if name not in known:
            raise unknown("fault" if stage is None else f"fault of {stage}", name, known)
    return [entry for entry in found if not names or entry.name in names]
