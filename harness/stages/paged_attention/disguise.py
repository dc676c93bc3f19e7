"""The steps of the stage `paged_attention` as an implementation with other roundings has them."""

import torch
from torch import Tensor

from moe_harness.harness.stages.paged_attention.faults._steps import Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
        scores = torch.einsum("nhd,lhd->nhl", q.double(), keys.double()) * scale
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp().to(dtype).double()
        return (torch.einsum("nhl,lhd->nhd", weights, values.double()) / weights.sum(-1, keepdim=True)).float()

    return Steps(attend=attend)
