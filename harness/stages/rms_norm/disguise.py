"""The steps of the stage `rms_norm` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.stages.rms_norm.faults._steps import Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def root(s: Tensor, eps: float) -> Tensor:
        return (1 / (s.double().square().mean(-1, keepdim=True) + eps).sqrt()).float()

    def scale(s: Tensor, weight: Tensor) -> Tensor:
        return s.to(dtype).float() * weight

    return Steps(root=root, scale=scale)
