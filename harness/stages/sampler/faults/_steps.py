"""The choice of a token in replaceable steps: `run` is right."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.reference.sampler import probabilities

Step = Callable[..., Any]


def mixed(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers of (seed, position, token), fp64 [B, count]: the finaliser of SplitMix64 over all three."""
    token = torch.arange(count)
    z = (
        seeds.long()[:, None] * -7046029254386353131
        + positions.long()[:, None] * 7046029288634856825
        + token * 974711
        + 1
    )
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    z = z ^ (z >> 31 & (1 << 33) - 1)
    return ((z >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53


def choose(p: Tensor, u: Tensor) -> Tensor:
    """The token with the smallest exponential variate over its probability."""
    return (-u.log() / p.clamp(min=1e-300)).masked_fill(p <= 0, torch.inf).argmin(1)


class Steps(NamedTuple):
    """The steps that every implementation has in its own way: its random numbers, and what it does with them."""

    uniform: Step = mixed
    choose: Step = choose


RIGHT = Steps()


def run(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, seeds: Tensor,
    positions: Tensor, distribution: Step = probabilities, uniform: Step | None = None, choose: Step | None = None,
    steps: Steps = RIGHT,
) -> Tensor:  # fmt: skip
    """A right implementation; the last keywords replace its steps."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64)
    p = distribution(logits.double(), temperature=temperature.double(), top_k=top_k, top_p=top_p)
    u = (uniform or steps.uniform)(seeds, positions, logits.shape[1])
    return (choose or steps.choose)(p, u)
