"""Results of very many rows are judged in parts: a right one passes, and a mistake in any part is found and placed."""

import pytest
import torch

from moe_harness.harness.checks.plain import plain
from moe_harness.harness.core import bounds, invocation
from moe_harness.harness.core import call as stage_calls
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.stage import find_stage
from moe_harness.harness.run import data_power
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.harness.stages.router.cases import RouterCase
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase

PART = 16
DATA = ("exact", "normal")
CASES: dict[str, tuple[str, list[Case]]] = {
    "experts": ("torch:loop", [ExpertsCase(T=70, H=32, I=16, E=6, k=2, data=data) for data in DATA]),
    "router": ("torch:topk", [RouterCase(T=70, E=16, k=4)]),
    "grouped_linear": ("torch:loop", [GroupedLinearCase(S=70, K=32, N=16, E=5, data=data) for data in DATA]),
    "shared_expert_gate": ("torch:expression", [GateCase(lead="5x14", H=32, D=32, data=data) for data in DATA]),
}
ALL = [(stage, spec, case) for stage, (spec, cases) in CASES.items() for case in cases]
NAMES = [f"{stage}-{case.data}" for stage, _, case in ALL]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocation, "PART", PART)
    monkeypatch.setattr(data_power, "PART", PART)


@pytest.mark.parametrize(("stage", "spec", "case"), ALL, ids=NAMES)
def test_right_results_pass(stage: str, spec: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Trial(load(stage, spec), "cpu")
    assert data_power.prove(judge, case).case == case
    record = plain(judge, case)
    assert not record.findings
    monkeypatch.setattr(invocation, "PART", 1 << 16)
    assert record.elements == plain(judge, case).elements


@pytest.mark.parametrize("wrong", [0, 37, 69])
@pytest.mark.parametrize(("stage", "spec", "case"), ALL, ids=NAMES)
def test_one_wrong_row_is_found_and_its_part_told(stage: str, spec: str, case: Case, wrong: int) -> None:
    judge = Trial(load(stage, spec), "cpu")
    call = judge.build(case)
    result = judge.invoke(call)
    first = result[0] if isinstance(result, tuple) else result
    bounds.matrix(first)[wrong] += 1
    (finding, *_) = judge.judge(call, result).findings
    low = wrong // PART * PART
    assert finding.message.startswith(f"among rows {low} to {min(low + PART, 70) - 1}: ")


def test_rows_of_a_call_keep_their_experts() -> None:
    """Of a grouped linear the groups follow the chosen rows."""
    call = Trial(load("grouped_linear", "torch:loop"), "cpu").build(GroupedLinearCase(S=70, K=32, N=16, E=5))
    chosen = torch.tensor([0, 33, 69])
    made = find_stage("grouped_linear").cut(call, chosen)
    assert int(made.args["group_sizes"].sum()) == 3
    assert torch.equal(made.args["x"], call.args["x"][chosen])


@pytest.mark.parametrize(("stage", "spec", "case"), [a for a in ALL if a[2].data == "exact"])
def test_data_of_very_many_repeated_values_are_exact(
    stage: str, spec: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cases beyond 2^31 are made of, at a size that a CPU holds: the 2,240 values of an operand repeat."""
    monkeypatch.setattr(stage_calls, "LARGE", 2000)
    monkeypatch.setattr(stage_calls, "PERIOD", 1999)
    judge = Trial(load(stage, spec), "cpu")
    first = bounds.matrix(next(iter(judge.build(case).args.values()))).flatten()
    assert (first[1999:] == first[: len(first) - 1999]).float().mean() > 0.5  # but for columns that are set afterwards
    assert data_power.prove(judge, case).case == case
    assert not plain(judge, case).findings
