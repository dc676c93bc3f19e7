"""The command `moe-harness`.  It imports no torch: implementations are loaded and judged in worker processes."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_harness.harness import contracts
from moe_harness.harness.cases.request import PROFILES, Request
from moe_harness.harness.commands import Debug, Device, writable
from moe_harness.harness.errors import EXIT_CANNOT_JUDGE, HarnessError, UsageError, unknown

app = typer.Typer(
    name="moe-harness", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Judge Mixture-of-Experts kernels: is it right, on which inputs is it wrong, and why?",
)  # fmt: skip

Stage = Annotated[
    str, typer.Option("--stage", "-s", help=f"What it is: {', '.join((*contracts.STAGES, *contracts.RANK_STAGES))}.")
]
Impl = Annotated[
    list[str], typer.Option("--impl", "-i", help="A registered name, module:function or file.py:function.")
]


@app.command()
def check(
    stage: Stage,
    impl: Impl,
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, fp16, bf16; may be repeated. All declared ones.")
    ] = None,
    profile: Annotated[str, typer.Option(help=f"{', '.join(PROFILES)}.")] = "quick",
    config: Annotated[
        list[str] | None, typer.Option(help="Add the shapes of a released model; may be repeated.")
    ] = None,
    checks: Annotated[list[str] | None, typer.Option("--check", help="Only this check; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Other data, other combinations.", min=0)] = 0,
    ranks: Annotated[str, typer.Option(help="World sizes for dispatcher and parallel_linear.")] = "1,2,3,4",
    timeout: Annotated[float, typer.Option(help="Seconds one case may take.", min=1)] = 60.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")] = None,
    debug: Debug = False,
) -> None:
    """Judge one or more implementations of a stage."""
    from moe_harness.harness import engine, report
    from moe_harness.harness.pool import prepare

    request = _request(stage, device, dtype, profile, config, seed)
    options = engine.Options(request.dtypes if dtype else None, timeout, _known_checks(stage, request, checks))
    worlds = _worlds(ranks)
    writable(json)
    writable(html)
    prepare()
    results: list[report.Result] = []
    errors: list[HarnessError] = []
    with report.Progress() as progress:
        for spec in impl:
            try:
                results.append(_judge(stage, spec, request, options, worlds, progress, _keeper(json, results)))
            except HarnessError as error:
                errors.append(error)
                results.append(engine.error_result(stage, spec, request, error))
            if results[-1]["interrupted"]:
                break
    _deliver(results, json, html)
    for told in errors:
        _tell(told, debug)
    raise typer.Exit(_status(results, errors))


def _judge(
    stage: str, spec: str, request: Request, options: Any, worlds: tuple[int, ...], progress: Any, keep: Any
) -> Any:
    from moe_harness.harness import engine

    if stage in contracts.STAGES:
        return engine.judge(stage, spec, request, options, progress)
    from moe_harness.harness.ranks.run import judge_ranks

    return judge_ranks(stage, spec, request, options, worlds, progress, keep)


def _keeper(json: Path | None, before: list) -> Any:
    """Writes an unfinished result behind those `before`, whole at any time; nothing where no file was asked for."""
    from moe_harness.harness import report

    def keep(result: Any) -> None:
        if json is not None:
            unfinished = json.with_name(json.name + ".part")
            unfinished.write_text(report.dumps([*before, result]))
            unfinished.replace(json)

    return keep


def _worlds(text: str) -> tuple[int, ...]:
    try:
        worlds = tuple(int(part) for part in text.split(","))
    except ValueError:
        worlds = ()
    if not worlds or min(worlds) < 1 or max(worlds) > 64:
        raise UsageError(f"--ranks is {text!r}, but should be world sizes such as 1,2,4")
    return worlds


def _status(results: list, errors: list[HarnessError]) -> int:
    """A wrong call counts before a failure, since it is the caller's to mend; a failure before what was not judged."""
    if any(isinstance(error, UsageError) for error in errors):
        return UsageError.exit_status
    from moe_harness.harness.report import exit_status

    return exit_status(results)


@app.command(name="list")
def list_(
    stage: Annotated[str | None, typer.Option("--stage", "-s", help="Only this stage.")] = None,
) -> None:
    """Print the registered implementations of each stage, the checks, and the models of --config."""
    from rich.console import Console
    from rich.table import Table

    from moe_harness.fixtures.configs import names

    console = Console()
    known = (*contracts.STAGES, *contracts.RANK_STAGES)
    for name in [contracts.check_stage(stage, known)] if stage else known:
        table = Table(
            title=f"{name}{contracts.SIGNATURES.get(name, ': a class, one object per rank')}",
            title_justify="left",
            show_header=False,
            box=None,
        )
        for registered, module in contracts.registered(name).items():
            table.add_row(registered, f"[dim]{module}[/dim]")
        console.print(table)
        console.print()
    console.print("models for --config: " + ", ".join(names()))


def _request(
    stage: str, device: str, dtype: list[str] | None, profile: str, config: list[str] | None, seed: int
) -> Request:
    """The checked form of what was asked; UsageError for any unknown name."""
    from moe_harness.fixtures.configs import names, shape

    contracts.check_stage(stage, (*contracts.STAGES, *contracts.RANK_STAGES))
    for kind, value, known in (("device", device, contracts.DEVICES), ("profile", profile, PROFILES)):
        if value not in known:
            raise unknown(kind, value, list(known))
    dtypes = tuple(dict.fromkeys(part for value in dtype or () for part in value.split(",")))
    for name in dtypes:
        if name not in contracts.DTYPES:
            raise unknown("dtype", name, list(contracts.DTYPES))
    for name in config or ():
        if name not in names():
            raise unknown("config", name, names())
    shapes = tuple(shape(name) for name in config or ())
    return Request(profile, device, dtypes or contracts.DTYPES, shapes, seed)


def _known_checks(stage: str, request: Request, checks: list[str] | None) -> tuple[str, ...] | None:
    if not checks or stage not in contracts.STAGES:
        return None
    from moe_harness.harness.cases import plan

    known = [*dict.fromkeys(p.check for p in plan(stage, request)), "property"]
    for check_name in checks:
        if check_name not in known:
            raise unknown(f"check of {stage}", check_name, known)
    return tuple(checks)


def _deliver(results: list, json: Path | None, html: Path | None) -> None:
    from moe_harness.harness import report

    report.print_report(results)
    if json is not None:
        json.write_text(report.dumps(results))
    if html is not None:
        from moe_harness.harness.report.html import write_html

        write_html(results, html)


def _tell(error: HarnessError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"moe-harness: {error}", file=sys.stderr)


def _register_commands() -> None:
    from moe_harness.harness.commands.audit import audit
    from moe_harness.harness.commands.bench import bench
    from moe_harness.harness.commands.faults import faults
    from moe_harness.harness.commands.replay import replay
    from moe_harness.harness.commands.tune import tune

    for command in (replay, faults, audit, bench, tune):
        app.command()(command)


_register_commands()


def main() -> None:
    """Entry point: exit status 0, 1, 2 or 3 as the contract says, and no traceback without --debug."""
    debug = "--debug" in sys.argv
    try:
        app()
    except HarnessError as error:
        _tell(error, debug)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(EXIT_CANNOT_JUDGE)
    except Exception as error:
        if debug:
            raise
        print(f"moe-harness failed: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(EXIT_CANNOT_JUDGE)


if __name__ == "__main__":
    main()
