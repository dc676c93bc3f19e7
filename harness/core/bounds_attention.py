r"""Bounds of the attention side (norm, rotation, attention, draws), in the terms of `core/bounds.py`.

First order throughout: an error in a step moves the result by its derivative, independent errors add as variances.
What a stage's implementations may round beyond fp32 is named in its `contract.py`; `rounds` here is the set in force.
"""

from math import log, log10, sqrt

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import (
    ACCUMULATOR,
    FALSE_ALARMS,
    STATISTICS_PER_RUN,
    Bound,
    Rounds,
    accumulation,
    cut,
    finish,
    in_tf32,
    product_variance,
    store,
)

UNTOUCHED = 1e-300  # variance of what must keep its bits: any other value is further off than every limit
RSQRT = 4 * ACCUMULATOR  # approximate reciprocal roots of GPUs are good to 2 roundoffs, 1 / sqrt(x) to 1.5
ANGLE = 6 * ACCUMULATOR  # of an angle in fp32: power (4), its rounding, and that of the product with the position
TRIGONOMETRIC = 2 * ACCUMULATOR  # absolute, of sin and cos


def untouched(value: Tensor) -> Bound:
    """A result that has to have these very bits."""
    wide = value.double()
    return Bound(wide, torch.full_like(wide, UNTOUCHED), torch.zeros_like(wide), _sources(wide))


def _sources(value: Tensor) -> Tensor:
    """Errors of their own for all elements, one common to a row."""
    sources = torch.ones(value.shape[:-1].numel(), 2, dtype=torch.float64, device=value.device)
    sources[:, 0] = torch.inf
    return sources


# ------------------------------------------------------------------------------------------------------------- rms_norm


def _normalised(
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


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None, rounds: Rounds
) -> tuple[Bound, Bound] | Bound:
    """Bound of the stage `rms_norm`; with a residual, of both results."""
    dtype = x.dtype
    s = x.double() if residual is None else x.double() + residual.double()
    nothing = torch.zeros_like(s)
    of_s = store(s, dtype) if residual is not None and "sum" in rounds else nothing
    value, own, common = _normalised(s, of_s, weight.double(), eps, rounds, dtype)
    bound = Bound(value, finish(value, own + common, dtype), common, _sources(s))
    return bound if residual is None else (bound, Bound(s, finish(s, nothing, dtype), nothing, _sources(s)))


# ----------------------------------------------------------------------------------------------------------- rope_cache


def rotated_heads(
    x: Tensor, angles: Tensor, weight: Tensor | None, *, eps: float, rounds: Rounds, dtype: torch.dtype
) -> Bound:
    """Bound of x [T, heads, D] normalised, where there is a weight, and turned by angles [T, D / 2].

    An angle's error is common to the heads of a token, and systematic: it counts as one source.
    """
    value = x.double()
    own, common = torch.zeros_like(value), torch.zeros_like(value)
    if weight is not None:
        value, own, common = _normalised(value, own, weight.double(), eps, rounds, dtype)
        if "norm_output" in rounds:
            own = own + store(value, dtype)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    (a, b), (of_a, of_b), (in_a, in_b) = (t.chunk(2, dim=-1) for t in (value, own, common))
    first, second = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat([first, second], -1)
    across = torch.cat([second, first], -1)  # what an error of the angle moves along
    own = torch.cat([of_a * cos**2 + of_b * sin**2, of_b * cos**2 + of_a * sin**2], -1)
    common = torch.cat([in_a * cos**2 + in_b * sin**2, in_b * cos**2 + in_a * sin**2], -1)
    of_cos, of_sin = (TRIGONOMETRIC**2 + (store(t, dtype) if "cos_sin" in rounds else 0.0) for t in (cos, sin))
    own = own + torch.cat([a**2 * of_cos + b**2 * of_sin, b**2 * of_cos + a**2 * of_sin], -1)
    if "rotated" in rounds:
        products = [store(a * cos, dtype) + store(b * sin, dtype), store(b * cos, dtype) + store(a * sin, dtype)]
        own = own + torch.cat(products, -1)
    of_angle = (ANGLE * angles.abs()).square()[:, None]
    common = common + across.square() * torch.cat([of_angle, of_angle], -1)
    variance = finish(turned, own + common + 2 * store(turned, torch.float32), dtype)
    sources = _sources(value)
    if "cos_sin" in rounds:  # a rounded cosine serves two elements
        sources[:, 0] = x.shape[-1] / 2
    return Bound(turned, variance, common, sources)


# ------------------------------------------------------------------------------------------------------ paged_attention


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


# -------------------------------------------------------------------------------------------------------------- sampler


def statistic_limit() -> float:
    """Least probability of a count for which a right implementation is not to blame."""
    return FALSE_ALARMS / STATISTICS_PER_RUN


def count_headroom(count: int, draws: int, probability: float) -> float:
    """How far a count is in the tail of its binomial distribution, as a share of the limit: above 1 it fails."""
    from scipy.stats import binom

    if probability <= 0:
        return float("inf") if count else 0.0
    mean = draws * min(probability, 1.0)
    tail = binom.logsf(count - 1, draws, probability) if count > mean else binom.logcdf(count, draws, probability)
    return max(0.0, -(float(tail) + log(2)) / log(10)) / -log10(statistic_limit())


def spread_headroom(counts: Tensor, draws: int, probabilities: Tensor) -> float:
    """As `count_headroom` for all tokens at once: Pearson's statistic over cells that expect at least 20 draws.

    At 20 the tail of a cell is heavier than a Gaussian's; the statistic is corrected by its known excess of variance,
    so that the limit stays on the safe side.
    """
    from scipy.stats import chi2

    expected = probabilities * draws
    kept = expected >= 20
    cells = int(kept.sum())
    if cells < 2:
        return 0.0
    statistic = float(((counts - expected).square() / expected)[kept].sum())
    excess = sqrt(1 + float((1 / expected[kept]).sum()) / (2 * cells))
    tail = float(chi2.logsf(cells + (statistic - cells) / excess, cells))
    return max(0.0, -tail / log(10)) / -log10(statistic_limit())
