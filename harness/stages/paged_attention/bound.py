"""What a right result of the stage `paged_attention` may be, from the error model of core/bounds."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import ACCUMULATOR, Rounds, accumulation, cut, in_tf32, product_variance, store


def _attended(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(scores of all keys, softmax weights of the visible ones [n, Hq, length], what comes of them [n, Hq, D])."""
    scores = torch.einsum("nhd,lhd->nhl", q, keys) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return scores, weights, torch.einsum("nhl,lhd->nhd", weights, values)


def _of_heads(rows: Tensor, columns: Tensor, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Variance of the products of rows [n, H, K] and columns [m, H, K] head by head: [n, H, m]."""
    pairs = zip(rows.unbind(1), columns.unbind(1), strict=True)
    return torch.stack([product_variance(r, c, rounds, dtype) for r, c in pairs], 1)


def _moving(moved: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """sum_j moved_j (v_j - out)^2: what variances `moved` of the weights [n, H, length] do to the result."""
    about = torch.einsum("nhl,lhd->nhd", moved, values.square()) - 2 * out * torch.einsum("nhl,lhd->nhd", moved, values)
    return (about + out.square() * moved.sum(-1, keepdim=True)).clamp(min=0)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, rounds: Rounds, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value, variance before the store, its part common to a row, what tf32 drifts to [n, Hq, D], sources [n, Hq, 2]).

    q [n, Hq, D] of one sequence, keys and values [length, Hq, D] (repeated for the heads that share them) in fp64,
    visible [n, length].  With weights p and scores s, d out = sum_j p_j ds_j (v_j - out); a rounded weight adds
    p_j v_j times its relative error, or p_j (v_j - out) where the sum of weights is taken after the rounding.  Weights
    are rounded as they are or relative to the largest: of either, no error is above half an ulp at p_j.
    """
    limits = torch.finfo(dtype)
    scores, p, out = _attended(q, keys, values, visible, scale)
    extreme = out
    if in_tf32(rounds, dtype):
        weights = cut(_attended(cut(q), cut(keys), values, visible, scale)[1])
        extreme = torch.einsum("nhl,lhd->nhd", weights, cut(values))
    squares = values.square()
    # exp takes the difference of a score and the largest, each rounded; the factor log2(e) is one rounding more
    of_score = (3 * ACCUMULATOR * (2 + scores.abs() + scores.amax(-1, keepdim=True).abs())).square()
    of_score = of_score + scale**2 * _of_heads(q, keys, rounds, dtype)
    if "score" in rounds:
        of_score = of_score + store(scores, dtype) + store(scores / scale, dtype) * scale**2
    if "scaled_query" in rounds:
        by_element = torch.einsum("nhd,lhd->nhl", q.square(), keys.square())
        of_score = of_score + (scale * limits.eps) ** 2 / 12 * by_element
    moved = p.square() * of_score
    variance = _moving(moved, values, out)
    rounded = torch.zeros_like(p)
    if "probability" in rounds:
        rounded = p.clamp(min=limits.smallest_normal).square() * (limits.eps**2 / 12)
        rounded = rounded.masked_fill(~visible[:, None], 0.0)
        before, after = torch.einsum("nhl,lhd->nhd", rounded, squares), _moving(rounded, values, out)
        variance = variance + torch.maximum(before, after)
    variance = variance + _of_heads(p, values.permute(2, 1, 0), rounds, dtype)
    if "partial_sum" in rounds:
        variance = variance + store(torch.einsum("nhl,lhd->nhd", p, squares).sqrt(), dtype)
    common = out.square() * (accumulation(len(keys)) + (4 * ACCUMULATOR) ** 2)  # of the sum of weights, of the division
    per_key = (moved + rounded) * squares.mean(-1).T
    own = variance.mean(-1).square() / per_key.square().sum(-1)
    own = own.clamp(min=1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return out, variance + common, common, extreme, torch.stack([own, torch.ones_like(own)], -1)
