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
    "shared_divided_by_ranks": "shared expert divided by the ranks",
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
    "writes_rows": ("inputs", "rows was modified"),
    "half_of_the_buffer_not_written": ("reduction", "call 2 of 3"),
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


CAUSES = {
    "through_bf16": ("R=2,T=2+1,shared=none", "narrower than float32"),
    "through_fp16": ("dtype=bf16,R=2,T=2+1,shared=none", "narrower than bfloat16"),
    "averaged": ("R=2,T=2+1,shared=none", "averaged over the ranks"),
    "cleaned": ("data=infinite,R=2,T=2+1,shared=none", "an infinity is replaced"),
    "picked_by_a_product": ("data=infinite,R=2,T=2+1,shared=none,sequence=1", "an infinity spreads"),
    "a_block_of_columns": ("R=2,T=2+1,H=2049,shared=none", "no multiple"),
    "strides_ignored": ("layout=routed:padded,R=2,T=2+1,shared=none", "no multiple"),
    "a_buffer_too_small": ("R=2,T=65+65,H=2049,shared=none", "no multiple"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_what_plain_data_do_not_show_has_cases_and_a_cause(name: str) -> None:
    """Seen with its cause on such a case; such cases are planned."""
    case, cause = CAUSES[name]
    finding = judge.judge(f"{FILE}:{name}", f"reduction/reduction/{case}").findings[0]
    assert finding.about == "reduction" and cause in finding.diagnosis[0]["fault"], finding
    planned = [planned.case for planned in cases.plan([2])]
    assert {case.layout.split(":")[-1] for case in planned} >= {"padded", "strided", "transposed", "unit"}
    assert {case.data for case in planned} == {"normal", "infinite"} and max(case.H for case in planned) > 2048


UNUSUAL = (
    "scattered_and_gathered", "by_functional", "by_method", "in_a_thread", "to_the_last_and_back", "letters",
    "as_dtensor", "own_rows_by_all_to_all", "all_in_one", "masked_by_a_product",
)  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_but_right(name: str) -> None:
    """A share of the plan with every layout, infinity and size in it."""
    chosen = [planned for place, planned in enumerate(cases.plan([2, 3])) if place % 7 == len(name) % 7]
    for planned in chosen:
        verdict = judge.judge(f"{FILE.with_name('unusual.py')}:{name}", planned.id)
        assert verdict.passed, format_findings(verdict)


def test_strides_may_be_refused_in_torchs_own_words() -> None:
    """No contract over ranks promises any strides; what is not refused has to be right."""
    impl = f"{FILE.with_name('unusual.py')}:seen_flat"
    for layout in ("routed:padded", "routed:transposed"):
        verdict = judge.judge(impl, f"reduction/reduction/R=2,T=2+3,shared=none,layout={layout},optional=1")
        assert not verdict.findings and "contiguous" in str(verdict.unsupported), format_findings(verdict)
    assert judge.judge(impl, "reduction/reduction/R=2,T=2+3,shared=none").passed
    assert all(p.case.optional for p in cases.plan([2]) if p.case.layout), "a case of strides that may not be refused"


def test_a_stranger_who_supports_half_of_it_is_told_what_was_judged() -> None:
    result = session.judge(
        "reduction", f"{FILE}:tensor_parallel_only", Request(), RunOptions(timeout=10.0), worlds=(1, 2)
    )
    assert verdict_of(result) == "pass", result["failures"][:1]
    assert sum(entry["cases"] for entry in result["coverage"]["unsupported"]) > 100
