"""`moe-harness check`: judge one or more implementations of a stage."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core import contracts
from moe_harness.harness.core.errors import HarnessError, UsageError
from moe_harness.harness.core.kept import last_failed as last_failed_cases
from moe_harness.harness.core.kept import remember_failed
from moe_harness.harness.core.ranked_stage import is_over_ranks


def check(
    stage: options.Stage,
    impl: options.Impl,
    device: options.Device = "cpu",
    dtype: options.Dtypes = None,
    profile: options.Profile = "quick",
    config: options.Configs = None,
    checks: options.Checks = None,
    seed: options.Seed = 0,
    ranks: Annotated[
        str | None, typer.Option(help=f"World sizes, 1,2,3,4 for {', '.join(contracts.RANK_STAGES)}; of model too.")
    ] = None,
    timeout: options.Timeout = 60.0,
    last_failed: Annotated[
        bool, typer.Option("--last-failed", "--lf", help="Only what failed when it was judged last.")
    ] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", "-x", help="End at the first failure, with its cause.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained page here.")] = None,
    baseline: options.Baseline = None,
    debug: options.Debug = False,
) -> None:
    """Judge one or more implementations of a stage."""
    from moe_harness.harness import report
    from moe_harness.harness.process.start import fork_server
    from moe_harness.harness.run import session

    request = options.request(stage, device, dtype, profile, config, seed)
    stage = options.one_of("stage", stage, options.ALL_STAGES)
    worlds, specs = options.worlds_of(stage, None if ranks is None else [ranks]), options.specs(impl)
    options.config_has_cases(stage, request, bool(worlds))
    chosen = options.chosen_checks(stage, request, checks, bool(worlds))
    asked = session.RunOptions(request.dtypes if dtype else None, timeout, chosen, None, fail_fast)
    options.writable(json)
    options.writable(html)
    options.readable(baseline)
    fork_server()
    results: list[report.Result] = []
    errors: list[HarnessError] = []
    with report.Progress() as progress:
        for spec in specs:
            try:
                cases = _failed_last(stage, spec, bool(worlds), progress) if last_failed else None
                one = replace(asked, cases=cases)
                keep = _keeper(json, results)
                results.append(session.judge(stage, spec, request, one, progress, worlds=worlds, keep=keep))
            except HarnessError as error:
                errors.append(error)
                results.append(session.error_result(stage, spec, request, error))
            if results[-1]["interrupted"]:
                break
    remember_failed(results)
    _deliver(results, json, html)
    for told in errors:
        options.tell(told, debug)
    raise typer.Exit(_compared(baseline, results, _status(results, errors)))


def _compared(baseline: Path | None, results: list, status: int) -> int:
    if baseline is None:
        return status
    from moe_harness.harness.record.against import against
    from moe_harness.harness.report.results import to_json

    return against(baseline, to_json(results), status)


def _failed_last(stage: str, spec: str, over_ranks: bool, progress: Any) -> tuple[str, ...] | None:
    """The cases of --last-failed; None, and so all of the plan, where none is known."""
    cases = tuple(case for case in last_failed_cases(stage, spec) if is_over_ranks(case) == over_ranks)
    if not cases:
        progress.note(f"{spec}: no failure of the last run is known, all cases are judged")
    return cases or None


def _keeper(json: Path | None, before: list) -> Any:
    """Writes an unfinished result behind those `before`, whole at any time; None where no file was asked for.

    Where that fails the run goes on: the finished result is told, and that its file cannot be written.
    """
    from moe_harness.harness import report

    if json is None:
        return None

    def keep(result: Any) -> None:
        unfinished = json.with_name(json.name + ".part")
        with suppress(OSError):
            unfinished.write_text(report.dumps([*before, result]))
            unfinished.replace(json)

    return keep


def _deliver(results: list, json: Path | None, html: Path | None) -> None:
    from moe_harness.harness import report

    report.print_report(results)
    for line in report.annotations(results):
        print(line)
    if json is not None:
        json.write_text(report.dumps(results))
    if html is not None:
        from moe_harness.harness.report.html import write_html

        write_html(results, html)


def _status(results: list, errors: list[HarnessError]) -> int:
    """A wrong call counts before a failure, since it is the caller's to mend; a failure before what was not judged."""
    if any(isinstance(error, UsageError) for error in errors):
        return UsageError.exit_status
    from moe_harness.harness.report import exit_status

    return exit_status(results)
