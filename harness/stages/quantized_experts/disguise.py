"""The steps of the stage `quantized_experts` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.stages.experts.disguise import running_sum
from moe_harness.harness.stages.quantized_experts.faults._steps import RIGHT, Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return RIGHT.glu(gate.to(dtype).float(), up.to(dtype).float(), activation).to(dtype).float()

    return Steps(glu=glu, combine=running_sum(dtype))
