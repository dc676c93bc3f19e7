"""Standard wrong outputs that guard the data are faults of the catalogue where one of them makes the same mistake."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.bounds import accumulation, max_limit
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.core.stage import find_stage

# By stage: the name of the wrong output, and of the fault.
OF_CATALOGUE = {
    "experts": {"gate_up_swapped": "gate_up_swapped", "flat_weights": "flat_weights",
                "last_slot_dropped": "last_slot_dropped", "last_of_I_dropped": "last_intermediate_column_lost"},
    "grouped_linear": {"bias_dropped": "linear_bias_ignored"},
    "moe_block": {"shared_expert_dropped": "shared_expert_dropped", "shared_expert_ungated": "shared_gate_lost"},
    "quantized_experts": {"clamp_dropped": "clamp_dropped", "scales_of_next_expert": "scales_of_next_expert",
                          "gate_up_bias_dropped": "gate_up_bias_dropped", "down_bias_dropped": "down_bias_dropped"},
    "router": {"bias_in_weights": "bias_in_weights",
               "groups_ignored": "groups_ignored", "scaling_dropped": "scaling_ignored"},
    "shared_expert_gate": {"ungated": "gate_dropped", "gate_without_sigmoid": "sigmoid_dropped",
                           "gate_complemented": "gate_inverted"},
}  # fmt: skip


def in_fp64(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: in_fp64(one) for name, one in value.items()}
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@pytest.mark.parametrize("stage", OF_CATALOGUE)
def test_what_guards_the_data_is_what_the_catalogue_knows(stage: str) -> None:
    """A wrong output and the fault of the catalogue that it stands for are one function of the data."""
    left, judging = dict(OF_CATALOGUE[stage]), find_stage(stage)
    for planned in plan(stage, Request(dtypes=("fp32",))):
        if not left or planned.check not in ("numeric", "routing"):
            continue
        call = judging.build(planned.case, "cpu")
        wrong = judging.wrong_outputs(call)
        for name in [name for name in left if name in wrong]:
            fault = get(left.pop(name))
            found = fault.function(*map(in_fp64, call.args.values()), **in_fp64(call.keywords))
            for ours, theirs in zip(tensors(wrong[name]), tensors(found), strict=True):
                off = (ours.double() - theirs.double().reshape(ours.shape)).abs().max()
                assert off <= max_limit() * accumulation(512) ** 0.5 * ours.abs().max(), (name, planned.id)
    assert not left, "these apply to no planned case"


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
