"""The steps of the stage `router` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import wide
from moe_harness.harness.stages.router.faults._steps import Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def score(logits: Tensor, scoring: str) -> Tensor:
        kind, logits = wide(logits), logits.double()
        return (logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()).to(kind)

    def weigh(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids).double()
        total = weights.flip(-1).sum(-1, keepdim=True) if renormalize else 1.0
        return (weights * scale / total).to(scores.dtype)

    return Steps(score=score, weigh=weigh)
