"""The steps of the stage `shared_expert_gate` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import wide
from moe_harness.harness.stages.shared_expert_gate.faults._steps import Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def dot(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        return (hidden_states.double() @ gate_weight.double().T).to(dtype).to(wide(hidden_states))

    return Steps(dot=dot)
