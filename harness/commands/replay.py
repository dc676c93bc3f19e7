"""`moe-harness replay CASE ... --impl SPEC`: single cases again, with everything that is found."""

from collections.abc import Iterator
from typing import Annotated

import typer

from moe_harness.harness.commands import options
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.errors import EXIT_CANNOT_JUDGE, UsageError, unknown
from moe_harness.harness.core.findings import Answer, Explanation
from moe_harness.harness.core.names import CHECK_NAMES
from moe_harness.harness.core.ranked_stage import is_over_ranks

Judged = Iterator[tuple[Answer, Explanation | None]]  # an answer, and why its first finding is so


def replay(
    cases: Annotated[list[str], typer.Argument(help="Case ids as a failure prints them; judged in this order.")],
    impl: Annotated[
        str,
        typer.Option(
            "--impl", "-i", help="The implementation.", autocompletion=options.starting_with(options.implementations)
        ),
    ],
    device: options.Device = "cpu",
    timeout: options.Timeout = 60.0,
    debug: options.Debug = False,
) -> None:
    """Judge single cases again, in one fresh process, and show what is found."""
    from rich.console import Console

    from moe_harness.harness.report.terminal import emit, failure_block
    from moe_harness.harness.run.result_builder import add_cause, failure_of

    ranked = any(is_over_ranks(case) for case in cases)
    answers = _of_ranks(cases, impl, device, timeout) if ranked else _of_one_device(cases, impl, device, timeout)
    console, failed, executed = Console(), 0, 0
    for answer, why in answers:
        console.print(f"{answer.status}  {answer.id}", highlight=False, soft_wrap=True)
        if answer.reason:
            console.print(f"  {answer.reason}", highlight=False, soft_wrap=True, markup=False)
        failures = [failure_of(answer.id, finding) for finding in answer.findings]
        if failures:
            add_cause(failures[0], why)
        for failure in failures:
            emit(console, failure_block(dict(failure)))
        executed += answer.executed
        failed += answer.fails
    raise typer.Exit(1 if failed else 0 if executed else EXIT_CANNOT_JUDGE)


def _of_one_device(cases: list[str], impl: str, device: str, timeout: float) -> Judged:
    from moe_harness.harness.process.pool import Pool

    stages = {parse_id(case)[0] for case in cases}
    if len(stages) != 1:
        raise UsageError(f"the cases are of the stages {', '.join(sorted(stages))}, but should be of one")
    for case in cases:
        if (check := parse_id(case)[1]) not in CHECK_NAMES:
            raise unknown("check", check, list(CHECK_NAMES))
    with Pool(stages.pop(), impl, device, 1, timeout) as pool:
        pool.start()
        for case in cases:
            answer = pool.judge_one(case)
            somewhere = answer.findings and answer.findings[0].where
            yield answer, pool.explain(answer.judged) if somewhere else None


def _of_ranks(cases: list[str], impl: str, device: str, timeout: float) -> Judged:
    from moe_harness.harness.ranks.judge import judge

    for case in cases:
        yield judge(impl, case, backend="nccl" if device == "cuda" else "gloo", budget=timeout).answer(), None
