"""The stage `dispatcher`: any implementation over the planned cases, bit for bit against the dense layer.

pytest suites/dispatcher/test_dispatcher.py --impl my_dispatcher.py:MyDispatcher
"""

import pytest

from moe_harness.harness.core.plan import Planned
from moe_harness.harness.ranks import judge, pool
from moe_harness.harness.stages.dispatcher import cases
from moe_harness.suites.dispatcher.subjects import REGISTERED, chosen, format_findings

WORLDS = (1, 2, 3, 4)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", chosen(metafunc.config, REGISTERED))


@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_dense_layer(impl: str, world: int) -> None:
    judged, planned_cases = 0, list(cases.plan([world]))
    if world > 2 and impl in REGISTERED:  # most of all time: ours take every second one
        planned_cases = planned_cases[REGISTERED.index(impl) % 2 :: 2]
    for planned in planned_cases:
        verdict = judge.judge(impl, planned.id)
        judged += verdict.unsupported is None
        assert not verdict.findings, format_findings(verdict)
    if not judged:
        pytest.skip(f"{impl} refuses every case: {verdict.unsupported}")


@pytest.mark.parametrize("impl_exact", ["naive", "allgather_reducescatter", "all_to_all", "all_to_all_dedup"])
@pytest.mark.parametrize("world", [2, 4])
def test_sends_exactly_what_the_formula_says(impl_exact: str, world: int) -> None:
    """Beyond the formula there is one 64-bit count for each other rank of the group and dispatch."""
    for _, case in list(cases.plan([world]))[::5]:
        verdict = judge.judge(f"dispatchers:{impl_exact}", Planned("dense", case).id)
        for rank in verdict.observed:
            counts = 8 * (world // case.groups - 1) * rank["dispatches"]
            assert rank["sent"] == pytest.approx(rank["needed"] + counts, abs=0.5), format_findings(verdict)


def test_eight_ranks() -> None:
    for _, case in list(cases.plan([8]))[::9]:
        verdict = judge.judge("dispatchers:all_to_all_dedup", Planned("dense", case).id)
        assert verdict.passed, format_findings(verdict)


def test_deepep_is_refused_with_the_reason() -> None:
    verdict = judge.judge("dispatchers:deepep", "dispatcher/dense/R=2,E=4,k=2,T=2+2")
    assert not verdict.findings
    assert "deep_ep" in str(verdict.unsupported)


def _refusals(**spec: object) -> list[str]:
    outcome = pool.run("moe_harness.suites.dispatcher.tasks:distinct_tokens", spec, ranks=3)
    assert outcome.ok, outcome.failure
    return outcome.results


@pytest.mark.parametrize(("tokens", "differ"), [([2, 2, 2], True), ([2, 3, 2], False), ([0, 0, 1], False)])
def test_local_allreduce_refuses_distinct_tokens_on_every_rank(tokens: list[int], differ: bool) -> None:
    said = _refusals(impl="dispatchers:local_allreduce", tokens=tokens, differ=differ)
    assert all("needs the same tokens on every rank" in message for message in said), said


def test_local_allreduce_takes_equal_tokens() -> None:
    assert _refusals(impl="dispatchers:local_allreduce", tokens=[2, 2, 2], differ=False) == [""] * 3


def test_masked_refuses_more_tokens_than_its_bound_on_every_rank() -> None:
    options = {"max_tokens": 2}
    said = _refusals(impl="dispatchers:masked", tokens=[1, 3, 0], differ=True, options=options)
    assert all("max_tokens is 2" in message for message in said), said
    assert _refusals(impl="dispatchers:masked", tokens=[1, 2, 0], differ=True, options=options) == [""] * 3
