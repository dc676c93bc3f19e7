"""The search for a case that fails: specs are drawn, never tensors, so that a failure shrinks to its smallest case."""

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.folders import stage_part
from moe_harness.harness.core.plan import plan
from moe_harness.harness.core.request import Request


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
    judge: Callable[[Case], bool],
    *,
    examples: int,
    start: int,
    out_of_time: Callable[[], bool],
) -> Case | None:
    """Draw cases of `stage` and return the smallest one that `judge` rejects, or None."""
    return falsify(cases(stage, dtypes), judge, examples=examples, start=start, out_of_time=out_of_time)


def falsify(
    drawn: st.SearchStrategy[Case],
    judge: Callable[[Case], bool],
    *,
    examples: int,
    start: int,
    out_of_time: Callable[[], bool],
) -> Case | None:
    """Draw `examples` cases and return the smallest one that `judge` rejects, or None; stop once `out_of_time`."""
    known: dict[str, bool] = {}
    rejected: list[Case] = []

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
        if name not in known:
            known[name] = True if out_of_time() else judge(case)
        if not known[name]:
            rejected.append(case)
            raise _Falsified

    try:
        holds()
    except _Falsified:
        return rejected[-1]  # Hypothesis runs the smallest one last
    return None
