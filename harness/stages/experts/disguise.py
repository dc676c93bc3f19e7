"""The steps of the stage `experts` as an implementation with other roundings has them."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import product_in
from moe_harness.harness.stages.experts.faults._steps import Steps, act, live


def running_sum(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The weighted sum over slots, from the last to the first, held in `dtype`."""

    def combine(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weighted = live(topk_weights, ids, slots.dtype)[..., None] * slots
        total = weighted.new_zeros(len(ids), slots.shape[-1], dtype=dtype)
        for slot in weighted.unbind(1)[::-1]:
            total = (total.double() + slot.to(dtype).double()).to(dtype)
        return total.to(slots.dtype)

    return combine


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return (act(gate.double(), activation) * up.double()).to(dtype).to(gate.dtype)

    return Steps(matmul=product_in(dtype), gated=gated, combine=running_sum(dtype))
