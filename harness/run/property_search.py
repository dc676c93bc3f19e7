"""The search for a case that fails: specs are drawn, never tensors, so that a failure shrinks to its smallest case."""

import time
from collections.abc import Callable
from contextlib import suppress

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.findings import Answer
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.core.registry import stage_part


def cases(stage: str, dtypes: tuple[str, ...]) -> st.SearchStrategy[Case]:
    """Cases of `stage` in any of `dtypes`: those of its `strategy.py`, or its planned ones on other data."""
    module = stage_part(stage, "strategy")
    if module is not None:
        return module.cases(st.sampled_from(dtypes))
    planned = [p.case for p in plan(stage, Request(dtypes=dtypes)) if p.check in ("exact", "numeric")]
    return st.builds(lambda case, number: case.but(seed=number), st.sampled_from(planned), st.integers(0, 999))


class _Falsified(Exception):
    """The one exception of a search, always from one line, so that shrinking compares cases and not causes."""


def search(
    stage: str,
    dtypes: tuple[str, ...],
    ask: Callable[[Case], Answer],
    *,
    examples: int,
    start: int,
    seconds: float,
) -> list[Answer]:
    """As `falsify`, with cases of `stage`."""
    return falsify(cases(stage, dtypes), ask, examples=examples, start=start, seconds=seconds)


def falsify(
    drawn: st.SearchStrategy[Case],
    ask: Callable[[Case], Answer],
    *,
    examples: int,
    start: int,
    seconds: float,
) -> list[Answer]:
    """The answers on `examples` drawn cases, or as many as there is time for; of those that fail the smallest alone."""
    answers: dict[str, Answer | None] = {}  # None: out of time
    failing: list[str] = []
    end = time.monotonic() + seconds

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(drawn)
    def holds(case: Case) -> None:
        name = case.id()
        if name not in answers:
            answers[name] = None if time.monotonic() > end else ask(case)
        answer = answers[name]
        if answer is not None and answer.fails:
            failing.append(name)
            raise _Falsified

    with suppress(_Falsified):
        holds()
    smallest = failing[-1] if failing else None  # Hypothesis runs it last
    return [answer for name, answer in answers.items() if answer is not None and (not answer.fails or name == smallest)]
