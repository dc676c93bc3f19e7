"""The steps of the stage `moe_block` as an implementation with other roundings has them."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.stages.moe_block.faults._steps import RIGHT, Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def routed(x: Tensor, weights: Any, routing: Any, config: Any) -> Tensor:
        topk_weights, ids = routing
        found = RIGHT.routed(x.double(), weights, (topk_weights.to(dtype).double(), ids), config)
        return found.to(dtype).to(x.dtype)

    def shared(x: Tensor, weights: Any, config: Any) -> Tensor:
        return RIGHT.shared(x, weights, config).to(dtype).to(x.dtype)

    return Steps(routed=routed, shared=shared)
