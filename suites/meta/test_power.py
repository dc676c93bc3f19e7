"""The planned data can tell wrong from right, and data that cannot are replaced and counted before they judge."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import STAGES as ALL_STAGES
from moe_harness.harness.core.contracts import Declarations, Subject, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Planned, Request, plan
from moe_harness.harness.core.registry import registered
from moe_harness.harness.core.stage import ALL, Excuse, find_stage
from moe_harness.harness.process.worker import judge_id
from moe_harness.harness.report.words import power_summary
from moe_harness.harness.run import data_power
from moe_harness.harness.run.result_builder import Listener, ResultBuilder
from moe_harness.harness.run.session import RunOptions, judge
from moe_harness.harness.stages.experts.cases import ExpertsCase
from moe_harness.harness.stages.experts.stage import STAGE as experts_stage
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase

STAGES = tuple(stage for stage in ALL_STAGES if stage != "model")  # that one's wrong models are in suites/model
MAIN_CHECK = {"router": "routing"}  # of the others it is "numeric"
LARGEST = 3e6  # products T * k * H * I of a case that is worth its time here
# Of every 100 planned data sets, how many may by chance be without power: a recipe that fails oftener has to be mended.
REPLACED_PER_CENT = 5
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MANY = 80  # data sets of a plan by day, spread evenly: all of them take minutes
EXCUSES = [
    pytest.param(stage, excuse, id=f"{stage}-{excuse.wrong}")
    for stage in STAGES
    for excuse in find_stage(stage).excuses()
]


def planned(stage: str, *checks: str) -> Iterator[Planned]:
    for item in plan(stage, Request()):
        case = item.case
        cost = getattr(case, "T", 1) * getattr(case, "k", 1) * getattr(case, "H", 1) * getattr(case, "I", 1)
        if item.check in (checks or data_power.JUDGING) and item.check not in ON_CUDA_ONLY and cost <= LARGEST:
            yield item


def some(items: list[Planned], offset: int = 0) -> list[Planned]:
    """All of them at night; by day in odd steps, since many cases come in pairs, without and with an operand."""
    step = 1 if NIGHTLY else len(items) // MANY | 1
    return items[min(offset, step - 1) :: step]


def trial_of(stage: str, function: Any) -> Trial:
    """With nothing declared, so that every rounding of the contract is permitted."""
    return Trial(Subject(stage, "given", function, Declarations(), None), "cpu")


def zeros(stage: str) -> Trial:
    """Returns zeros of the right shape; as a router the first experts, with weights of zero."""

    def function(first: torch.Tensor, *others: Any, top_k: int = 0, **options: Any) -> Any:
        if stage == "router":
            return torch.zeros(len(first), top_k), torch.arange(top_k).expand(len(first), top_k).clone()
        if stage == "grouped_linear":
            return first.new_zeros(len(first), others[0].shape[1])
        if stage == "sampler":
            return torch.zeros(len(first), dtype=torch.int64)
        if options.get("residual") is not None:
            return torch.zeros_like(first).contiguous(), torch.zeros_like(first).contiguous()
        return torch.zeros_like(others[-1] if stage == "shared_expert_gate" else first).contiguous()

    return trial_of(stage, function)


@pytest.mark.parametrize("stage", STAGES)
def test_few_planned_data_sets_have_to_be_replaced(stage: str) -> None:
    trial = Trial(
        load(stage, next(n for n in ("torch", "torch:loop", "torch:dequantized") if n in registered(stage))), "cpu"
    )
    items = list(planned(stage))
    proofs = [data_power.prove(trial, item.case) for item in some(items)]
    assert all(proof.case is not None for proof in proofs)
    assert sum(bool(proof.accepted) for proof in proofs) <= REPLACED_PER_CENT / 100 * len(proofs)
    assert sum(proof.rejected > 0 for proof in proofs) > 0.8 * len(proofs)


@pytest.mark.parametrize("stage", STAGES)
def test_a_kernel_that_returns_zeros_fails_on_all_data_that_judge(stage: str) -> None:
    trial = zeros(stage)
    for item in some(list(planned(stage)), offset=1):
        answer = judge_id(trial, item.id)
        excused = data_power.excused(item.case, "all_zeros") is not None or getattr(item.case, "T", 1) == 0
        assert answer.status == "failed" or excused or not answer.rejected, item.id


# (a recipe without power, wrong outputs that it cannot tell)
PLANTED = {
    "no_weights": ("gate_up_proj", 0.0, {"all_zeros", "doubled", "other_activation"}),
    "tiny_gates": ("hidden_states", 1e-4, {"other_activation", "gate_up_swapped"}),
}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that scale one operand of the ordinary data."""
    right = experts_stage.build

    def build(case: Case, device: str) -> Any:
        call = right(case, device)
        if case.data in PLANTED:
            operand, factor, _ = PLANTED[case.data]
            call.args[operand].mul_(factor)
            call.arena.refresh()
        return call

    monkeypatch.setattr(experts_stage, "build", build)


@pytest.mark.usefixtures("plant")
@pytest.mark.parametrize("recipe", PLANTED)
def test_a_recipe_without_power_is_replaced_and_counted(recipe: str) -> None:
    case_id = Planned("numeric", ExpertsCase(T=33, dtype="bf16", data=recipe)).id
    answer = judge_id(trial_of("experts", load("experts", "torch:loop").function), case_id)
    assert answer.status == "passed"
    assert set(answer.accepted) >= PLANTED[recipe][2]
    assert "data=" not in answer.judged and answer.judged != case_id  # the stage's ordinary data
    account = ResultBuilder("experts", "given", Request(), Listener())
    account.take(answer)
    found = account.result()["coverage"]["power"]
    assert found["proved"] == 1 and [entry["case"] for entry in found["replaced"]] == [case_id]
    assert power_summary(found).endswith("powerless data sets replaced: 1")


@pytest.mark.usefixtures("plant")
def test_zeros_do_not_pass_where_zeros_were_right() -> None:
    answer = judge_id(zeros("experts"), "experts/numeric/T=33,data=no_weights")
    assert answer.status == "failed"


@pytest.mark.usefixtures("plant")
def test_without_any_powerful_data_nothing_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_power, "_candidates", lambda case: iter([case]))
    answer = judge_id(zeros("experts"), "experts/numeric/T=33,data=no_weights")
    assert answer.status == "skipped" and "all_zeros" in (answer.reason or "")


def test_what_is_replayed_is_what_was_judged() -> None:
    """The id of the data that took the place of others needs no replacement itself."""
    trial = Trial(load("shared_expert_gate", "torch:loop"), "cpu")
    first = judge_id(trial, "shared_expert_gate/numeric/dtype=fp16,seed=50,lead=1,H=256,D=1")
    again = judge_id(trial, first.judged)
    assert first.accepted == ["last_of_H_dropped"]
    assert not again.accepted and again.judged == first.judged == again.id


def test_a_run_counts_what_it_replaced() -> None:
    asked = Request(dtypes=("bf16",))
    result = judge("shared_expert_gate", "torch:loop", asked, RunOptions(checks=("numeric",)))
    found = result["coverage"]["power"]
    assert result["verdict"] == "pass" and found["proved"] > 20 and found["replaced"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_wrong_output_applies_somewhere(stage: str) -> None:
    module = find_stage(stage).part("wrong")
    if module is None:
        pytest.skip("made of the right result alone")
    names = module.NAMES
    seen: set[str] = set()
    for item in planned(stage, MAIN_CHECK.get(stage, "numeric")):
        call = find_stage(stage).build(item.case, "cpu")
        call.truth = find_stage(stage).truth(call, None)
        seen |= set(find_stage(stage).wrong_outputs(call))
        if seen == set(names):
            break
    assert seen == set(names)


@pytest.mark.parametrize(("stage", "entry"), EXCUSES)
def test_every_excuse_holds_for_planned_data_and_not_for_all_of_them(stage: str, entry: Excuse) -> None:
    name, holds, why = entry
    cases = [item.case for item in plan(stage, Request())]
    excused = [case for case in cases if holds(case)]
    assert why and excused and len(excused) < len(cases)
    if name not in (ALL, "other_activation"):
        assert any(name in find_stage(stage).wrong_outputs(find_stage(stage).build(case, "cpu")) for case in excused)


@pytest.mark.parametrize("stage", STAGES)
def test_plain_data_are_excused_from_nothing(stage: str) -> None:
    """An excuse that holds for them would let data stand that tell no wrong output of that kind."""
    case = next(planned(stage, MAIN_CHECK.get(stage, "numeric"))).case
    call = find_stage(stage).build(case, "cpu")
    call.truth = find_stage(stage).truth(call, None)
    wrong = find_stage(stage).wrong_outputs(call)
    assert wrong and [name for name in wrong if data_power.excused(case, name)] == []


def test_one_row_is_enough_to_know_the_groups() -> None:
    """The sample keeps each row's expert, and its neighbour to be confused with."""
    case = GroupedLinearCase(S=70, E=128, sizes="sparse", bias=True)
    call = find_stage("grouped_linear").build(case, "cpu")
    call.truth = find_stage("grouped_linear").expect(call, None)
    part = find_stage("grouped_linear").cut(call, torch.tensor([69]))
    assert torch.equal(find_stage("grouped_linear").wrong_outputs(part)["doubled"] / 2, call.truth.value[69:70])
    assert len(part.args["weight"]) == 2
