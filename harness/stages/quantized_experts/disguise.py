"""The steps of the stage `quantized_experts` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.stages.experts.faults._steps import live
from moe_harness.harness.stages.quantized_experts.faults._steps import RIGHT, Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return RIGHT.glu(gate.to(dtype).float(), up.to(dtype).float(), activation).to(dtype).float()

    def combine(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weighted = live(topk_weights, ids, slots.dtype)[..., None] * slots
        total = weighted.new_zeros(len(ids), slots.shape[-1], dtype=dtype)
        for slot in weighted.unbind(1)[::-1]:
            total = (total.double() + slot.to(dtype).double()).to(dtype)
        return total.to(slots.dtype)

    return Steps(glu=glu, combine=combine)
