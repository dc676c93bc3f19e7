"""The steps of the stage `moe_block` as an implementation with other roundings has them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.stages.moe_block.faults import blocks
from moe_harness.harness.stages.moe_block.faults import blocks as right

RUN = right  # its `run` is the right implementation that the faults of the stage change


def other_steps(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Steps by name, rounded to `dtype` where the right ones are not."""
    right_routed, right_shared = blocks.routed, blocks.shared

    def routed(x: Tensor, weights: Any, routing: Any, config: Any) -> Tensor:
        topk_weights, ids = routing
        found = right_routed(x.double(), weights, (topk_weights.to(dtype).double(), ids), config)
        return found.to(dtype).to(x.dtype)

    def shared(x: Tensor, weights: Any, config: Any) -> Tensor:
        return right_shared(x, weights, config).to(dtype).to(x.dtype)

    return {"routed": routed, "shared": shared}
