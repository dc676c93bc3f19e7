"""Properties over specs, drawn by the controller only, and what they shrink to."""

import random

from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from moe_harness.harness.core.plan import Planned
from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.dispatcher import cases, strategy
from moe_harness.harness.stages.dispatcher.cases import DispatcherCase
from moe_harness.suites.dispatcher.subjects import REGISTERED, format_findings
from moe_harness.suites.drawing import examples

NO_FALSE_ALARM = examples(200)  # cases per run


@settings(max_examples=examples(100))
@given(impl=st.sampled_from(REGISTERED), case=strategy.cases(worlds=(1, 2, 4)))
def test_every_scheme_equals_the_dense_layer(impl: str, case: DispatcherCase) -> None:
    verdict = judge.judge(impl, Planned("dense", case).id)
    assert verdict.passed, format_findings(verdict)


def _fails(spec: str):
    return lambda case: bool(judge.judge(spec, Planned("dense", case).id).findings)


def _minimal(fault: str) -> DispatcherCase:
    options = settings(max_examples=300, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    spec = f"moe_harness.harness.stages.dispatcher.faults.{fault}"
    return find(strategy.cases(), _fails(spec), settings=options)


def test_a_planted_deadlock_shrinks_to_its_minimal_case() -> None:
    case = _minimal("collectives:empty_rank_skips")
    assert (case.R, case.E, case.k, sorted(case.tokens)) == (2, 1, 1, [0, 1]), case.id()


def test_a_planted_ownership_fault_shrinks_to_an_uneven_split() -> None:
    case = _minimal("ownership:owner_by_division")
    assert case.R == 2 and case.E <= 3 and case.k == 1, case.id()


def test_no_false_alarm_on_random_cases() -> None:
    rng = random.Random(0)
    for number in range(NO_FALSE_ALARM):
        impl = REGISTERED[number % len(REGISTERED)]
        verdict = judge.judge(impl, Planned("dense", cases.draw(rng, (1, 2, 3, 4))).id)
        assert verdict.passed, format_findings(verdict)
