"""The stage `reduction`: any implementation over every sum of states, and faults that each cell of the table sees.

pytest suites/reduction --impl my_layer.py:reduction
"""

from pathlib import Path

import pytest

from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.plan import Request
from moe_harness.harness.ranks import judge
from moe_harness.harness.report.results import verdict_of
from moe_harness.harness.run import session
from moe_harness.harness.run.session import RunOptions
from moe_harness.harness.stages.reduction import cases
from moe_harness.suites.dispatcher.subjects import chosen, format_findings

RIGHT = ("parallel", "moe_harness.harness.stages.reduction.faults.reductions:finish")
FILE = Path(__file__).parent / "strangers.py"
FAULTS = all_faults("reduction")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", chosen(metafunc.config, RIGHT))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_layer_on_one_rank(impl: str, world: int) -> None:
    for planned in cases.plan([world]):
        verdict = judge.judge(impl, planned.id)
        assert not verdict.findings, format_findings(verdict)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_shows_in_three_cases_and_hides_where_it_says(fault: Fault) -> None:
    verdict = judge.judge(fault.spec, fault.shows["case"])
    assert fault.shows["seen_by"] in {finding.about for finding in verdict.findings}, format_findings(verdict)
    for case in fault.hidden:
        assert judge.judge(fault.spec, case).passed, case
    killed = 0
    for planned in cases.plan([2, 4]):
        killed += bool(judge.judge(fault.spec, planned.id).findings)
        if killed == 3:
            return
    raise AssertionError(f"{killed} planned cases see it")


NAMED = {
    "replicated_shared_summed": "shared expert counted 2 times",
    "reduced_twice": "reduced twice",
    "shared_dropped": "shared expert missing",
    "shared_divided_by_ranks": "shared expert lost on all ranks but one",
    "shared_before_reduce_scatter": "shared expert counted 2 times",
    "reduction_left_out": "a reduction is missing",
}


@pytest.mark.parametrize("name", NAMED)
def test_the_fit_names_it(name: str) -> None:
    """output = a * Routed + b * Shared."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    finding = judge.judge(fault.spec, fault.shows["case"]).findings[0]
    assert NAMED[name] in finding.diagnosis[0]["fault"], finding


SAID = {
    "returns_the_input": ("inputs", "shares memory with routed"),
    "writes_the_input": ("inputs", "routed was modified"),
    "same_buffer": ("inputs", "changed by the next call"),
    "double": ("contract", "float64"),
    "unwaited": ("contract", "never waited for"),
    "skips_empty": ("ranks", "deadlock"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_strangers_do_wrong(name: str) -> None:
    check, words = SAID[name]
    for planned in cases.plan([2]):
        verdict = judge.judge(f"{FILE}:{name}", planned.id, budget=10.0)
        if verdict.findings:
            assert verdict.findings[0].about == check and words in verdict.findings[0].message, format_findings(verdict)
            return
    raise AssertionError(f"{name} survives")


def test_a_stranger_who_supports_half_of_it_is_told_what_was_judged() -> None:
    result = session.judge(
        "reduction", f"{FILE}:tensor_parallel_only", Request(), RunOptions(timeout=10.0), worlds=(1, 2)
    )
    assert verdict_of(result) == "pass", result["failures"][:1]
    assert sum(entry["cases"] for entry in result["coverage"]["unsupported"]) > 100
