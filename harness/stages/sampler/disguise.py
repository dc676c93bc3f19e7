"""The steps of the stage `sampler` as another implementation has them: other random numbers, used in another way."""

import torch
from torch import Tensor

from moe_harness.harness.stages.sampler.faults._steps import Steps, mixed

SALT = 918273645


def other_steps(dtype: torch.dtype) -> Steps:
    """Gumbel noise of other random numbers."""

    def uniform(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
        return mixed(seeds.long() * 7 + SALT, positions.long() * 3 + SALT, count)

    def choose(p: Tensor, u: Tensor) -> Tensor:
        noise = -(-u.log()).log()
        return (p.clamp(min=1e-300).log() + noise).masked_fill(p <= 0, -torch.inf).argmax(1)

    return Steps(uniform=uniform, choose=choose)
