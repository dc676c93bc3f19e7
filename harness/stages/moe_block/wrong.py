"""Standard wrong outputs of the stage `moe_block`, and the data that cannot tell them."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Excuse, Wrong, common
from moe_harness.harness.stages.moe_block.cases import CANCELLING
from moe_harness.reference import moe_block as block
from moe_harness.reference.experts import experts as routed_experts

NAMES = (
    "all_zeros", "doubled", "shared_expert_dropped", "routed_part_dropped", "shared_expert_ungated", "flat_weights",
    "row_of_next_token", "one_row_zeroed", "one_element_off",
)  # fmt: skip
EXCUSES = tuple(
    Excuse(name, lambda c: c.data in CANCELLING, "the shared expert adds nothing")
    for name in ("shared_expert_dropped", "shared_expert_ungated")
)


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call."""
    return moe_block(*call.args.values())


def moe_block(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Wrong:
    """Name -> wrong [T, H] in fp64."""
    x = hidden_states.double()
    if not x.numel():
        return {}
    wide = {name: weight.double() for name, weight in weights.items() if not name.startswith("experts.")}
    gate_up, down, act = weights["experts.gate_up_proj"], weights["experts.down_proj"], block.activation(config)
    shares, ids = block.routing(block.router_logits(x, wide, config), wide, config)
    routed = routed_experts(x, gate_up, down, shares, ids, activation=act)
    shared = block.shared_expert(x, wide, config)
    value = routed if shared is None else routed + shared
    found = common(value)
    if shared is not None:
        found |= {"shared_expert_dropped": routed, "routed_part_dropped": shared}
    if "shared_expert_gate.weight" in wide:
        found["shared_expert_ungated"] = routed + block.gated_mlp(x, wide, "shared_expert", act)
    if len(x) > 1:
        found["row_of_next_token"] = value.roll(1, 0)
    if ids.shape[1] > 1:
        flat = shares.mean(-1, keepdim=True).expand_as(shares)
        if not torch.allclose(flat, shares):
            found["flat_weights"] = value - routed + routed_experts(x, gate_up, down, flat, ids, activation=act)
    return {name: found[name] for name in NAMES if name in found}
