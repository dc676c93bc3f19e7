"""The steps of the stage `rope_cache` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.stages.rope_cache.faults._steps import Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        if weight is None:
            return x
        rows = x.double()
        return (rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).to(dtype).float()

    def turn(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (t.to(dtype).double() for t in (angles.cos(), angles.sin()))
        first, second = x.double().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).float()

    return Steps(norm=norm, turn=turn)
