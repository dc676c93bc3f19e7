"""What a right result of the stage `rms_norm` may be, from the error model of core/bounds.

First order: an error in a step moves the result by its derivative, independent errors add as variances.
"""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import ACCUMULATOR, Bound, Rounds, accumulation, finish, store

RSQRT = 4 * ACCUMULATOR  # approximate reciprocal roots of GPUs are good to 2 roundoffs, 1 / sqrt(x) to 1.5


def own_sources(value: Tensor) -> Tensor:
    """Errors of their own for all elements, one common to a row."""
    sources = torch.ones(value.shape[:-1].numel(), 2, dtype=torch.float64, device=value.device)
    sources[:, 0] = torch.inf
    return sources


def normalised(
    s: Tensor, of_s: Tensor, weight: Tensor, eps: float, rounds: Rounds, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, own variance, variance common to the row) of weight * s / sqrt(mean(s^2) + eps) before it is stored.

    The root has the error of a sum of H squares, half of it relative to itself, its own rounding, and what errors of s
    add up to; all of it scales the row.
    """
    terms = s.shape[-1]
    squares = s.square()
    mean = squares.mean(-1, keepdim=True) + eps
    root = mean.rsqrt()
    value = weight * s * root
    own = weight.square() * root.square() * of_s
    if "normalized" in rounds:
        own = own + weight.square() * store(s * root, dtype) * _alike(root, dtype)
    own = own + 2 * store(value, torch.float32)
    of_sum = accumulation(terms) * squares.square().sum(-1, keepdim=True) / (terms * mean).square() / 4
    of_sum = of_sum + (squares * of_s).sum(-1, keepdim=True) / (terms * mean).square()
    return value, own, value.square() * (of_sum + RSQRT**2)


def _alike(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """3 where a factor is so near a power of two that products with numbers of `dtype` all round the same way, else 1.

    Their errors are then half an ulp at most and all of one sign, where they would have ulp^2 / 12 of variance.
    """
    away = (factor.log2() - factor.log2().round()).abs()
    return torch.where(away < 2 * torch.finfo(dtype).eps, 3.0, 1.0)


def rms_norm_bound(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None, rounds: Rounds
) -> tuple[Bound, Bound] | Bound:
    """Bound of the stage `rms_norm`; with a residual, of both results."""
    dtype = x.dtype
    s = x.double() if residual is None else x.double() + residual.double()
    nothing = torch.zeros_like(s)
    of_s = store(s, dtype) if residual is not None and "sum" in rounds else nothing
    value, own, common = normalised(s, of_s, weight.double(), eps, rounds, dtype)
    bound = Bound(value, finish(value, own + common, dtype), common, own_sources(s))
    return bound if residual is None else (bound, Bound(s, finish(s, nothing, dtype), nothing, own_sources(s)))
