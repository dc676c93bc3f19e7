"""Standard wrong outputs of the stage `shared_expert_gate`, and the data that cannot tell them."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import ALL, Excuse, Wrong, common, without_last

NAMES = (
    "all_zeros", "doubled", "ungated", "gate_complemented", "gate_without_sigmoid", "gate_of_next_row",
    "last_16_of_H_dropped", "last_of_H_dropped", "one_row_zeroed", "one_element_off",
)  # fmt: skip


def _one_exact_row(case: Any) -> bool:
    return case.data == "exact" and case.rows() == 1


EXCUSES = (
    Excuse("gate_of_next_row", lambda c: c.layout == "hidden_states:expanded", "all rows are one"),
    Excuse("gate_of_next_row", lambda c: c.data == "saturated", "every gate is 1"),
    Excuse("ungated", lambda c: c.data == "saturated", "every gate is 1"),
    Excuse("ungated", _one_exact_row, "the only gate is 1"),
    Excuse(ALL, lambda c: c.data == "saturated_off", "zeros are right"),
)


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call."""
    return gate(*call.args.values())


def gate(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Wrong:
    """Name -> wrong [rows, D] in fp64; leading dimensions are flattened."""
    shared = shared_output.double().reshape(-1, shared_output.shape[-1])
    hidden = hidden_states.double().reshape(-1, hidden_states.shape[-1])
    weight = gate_weight.double()
    if not shared.numel():
        return {}
    logit = hidden @ weight.T
    scale = logit.sigmoid()
    closed = scale < torch.finfo(torch.float32).tiny  # zeros are right there
    found = common((scale * shared).masked_fill(closed, 0.0)) | {
        "ungated": shared,
        "gate_complemented": (1 - scale) * shared,
        "gate_without_sigmoid": logit * shared,
        "last_16_of_H_dropped": (without_last(hidden, 16) @ weight.T).sigmoid() * shared,
        "last_of_H_dropped": (without_last(hidden, 1) @ weight.T).sigmoid() * shared,
    }
    if len(shared) > 1:
        found["gate_of_next_row"] = scale.roll(1, 0) * shared
    return {name: found[name] for name in NAMES if name in found}
