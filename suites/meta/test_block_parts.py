"""Faults of router, experts and gate inside a block: which are taken over, that checks see them, that they are told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_harness.harness.checks import CHECKS
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.catalogue import all_faults, get
from moe_harness.harness.core.contracts import Declarations, Subject
from moe_harness.harness.core.invocation import Broken, Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.diagnosis.candidates import forget
from moe_harness.harness.diagnosis.search import explain
from moe_harness.harness.stages.experts.faults import _steps as slots
from moe_harness.harness.stages.moe_block.cases import FAMILIES, MoeBlockCase
from moe_harness.harness.stages.moe_block.faults.parts import LEFT_OUT, inside
from moe_harness.harness.stages.router.faults import _steps as router
from moe_harness.harness.stages.shared_expert_gate.faults import _steps as gates
from moe_harness.reference import moe_block as reference

PARTS = [fault for fault in all_faults("moe_block") if fault.part]
MATRIX = json.loads((Path(__file__).resolve().parents[2] / "docs" / "kill_matrix.json").read_text())
KILLER = {row["fault"]: row["first_killer"] for row in MATRIX["rows"]}
GENEROUS = 600.0  # seconds; the verdict of a test must not depend on how busy the machine is


def trial_of(function) -> Trial:
    return Trial(Subject("moe_block", "block", function, Declarations.of(function), None), "cpu")


def is_killed(trial: Trial, check: str, case) -> bool:
    try:
        return bool(CHECKS[check](trial, case).findings)
    except Broken:
        return True


def test_every_part_is_taken_over_from() -> None:
    assert {fault.part.stage for fault in PARTS} == {"router", "experts", "shared_expert_gate"}
    assert len(PARTS) >= 100


@pytest.mark.parametrize("name", [name for names in LEFT_OUT.values() for name in names])
def test_what_is_left_out_exists_and_is_no_fault_of_the_block(name: str) -> None:
    assert get(name).sign == "value"
    with pytest.raises(KeyError):
        get(f"{name}_in_block")


@pytest.mark.parametrize("right", [router.run, slots.run, gates.run], ids=lambda run: run.__module__)
def test_a_block_with_a_right_part_is_right(right) -> None:
    stage = right.__module__.split(".")[3]
    trial = trial_of(inside(replace(get("gate_up_swapped"), stage=stage, function=right)))
    for dtype in ("fp32", "bf16"):
        for family in FAMILIES:
            assert not is_killed(trial, "numeric", MoeBlockCase(family=family, dtype=dtype))


@pytest.mark.parametrize("fault", [f for f in PARTS if not f.stateful], ids=lambda fault: fault.name)
def test_the_case_that_killed_it_first_still_does(fault) -> None:
    _, check, case = parse_id(KILLER[fault.name]["case"])
    assert is_killed(trial_of(fault.function), check, case)


@pytest.mark.parametrize("fault", [f for f in PARTS if f.stateful], ids=lambda fault: fault.name)
def test_a_part_that_remembers_is_killed_by_the_plan(fault) -> None:
    forget(fault)
    trial = trial_of(fault.function)
    assert any(is_killed(trial, check, case) for check, case in plan("moe_block", Request()))


def _strangers_block(mlp, rule):
    """A Qwen block in the model's dtype, token by token, which shares no code with the harness."""

    def block(hidden_states: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
        if config["model_type"] != "qwen3_moe":
            raise NotImplementedError
        out = torch.zeros_like(hidden_states)
        for token, x in enumerate(hidden_states):
            scores = (weights["gate.weight"] @ x).float().softmax(-1)
            chosen, ids = scores.topk(config["num_experts_per_tok"])
            for weight, expert in zip(rule(chosen, config), ids.tolist(), strict=True):
                stacked = weights["experts.gate_up_proj"][expert], weights["experts.down_proj"][expert]
                out[token] += weight.to(x.dtype) * mlp(x, *stacked)
        return out

    return block


def _right_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


def _swapped_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    up, gate = (gate_up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


def _right_rule(chosen: Tensor, config: dict) -> Tensor:
    return chosen / chosen.sum() if reference.routing_rule(config).renormalize else chosen


def _last_dropped(chosen: Tensor, config: dict) -> Tensor:
    return _right_rule(chosen, config) * (chosen > chosen.min())


@pytest.mark.parametrize(
    ("mlp", "rule", "name"),
    [
        (_swapped_mlp, _right_rule, "gate_up_swapped_in_block"),
        (_right_mlp, lambda chosen, config: chosen, "never_renormalised_in_block"),
        (_right_mlp, _last_dropped, "last_slot_dropped_in_block"),
    ],
)  # fmt: skip
def test_a_strangers_block_is_told_which_part_is_wrong(mlp, rule, name: str) -> None:
    told = explain(trial_of(_strangers_block(mlp, rule)), MoeBlockCase(dtype="bf16"), GENEROUS)
    assert [entry["fault"] for entry in told][:1] == [name]
    assert told[0]["evidence"].startswith("Inside the block")


def test_a_strangers_right_block_is_told_nothing() -> None:
    assert explain(trial_of(_strangers_block(_right_mlp, _right_rule)), MoeBlockCase(dtype="bf16"), GENEROUS) == []
