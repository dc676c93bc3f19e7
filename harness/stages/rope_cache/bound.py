"""What right results of the stage `rope_cache` may be, from the error model of core/bounds."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import ACCUMULATOR, UNTOUCHED, Bound, Rounds, finish, store
from moe_harness.harness.stages.rms_norm.bound import normalised, own_sources

ANGLE = 6 * ACCUMULATOR  # of an angle in fp32: power (4), its rounding, and that of the product with the position
TRIGONOMETRIC = 2 * ACCUMULATOR  # absolute, of sin and cos


def untouched(value: Tensor) -> Bound:
    """A result that has to have these very bits."""
    wide = value.double()
    return Bound(wide, torch.full_like(wide, UNTOUCHED), torch.zeros_like(wide), own_sources(wide))


def rotated_heads(
    x: Tensor, angles: Tensor, weight: Tensor | None, *, eps: float, rounds: Rounds, dtype: torch.dtype
) -> Bound:
    """Bound of x [T, heads, D] normalised, where there is a weight, and turned by angles [T, D / 2].

    An angle's error is common to the heads of a token, and systematic: it counts as one source.
    """
    value = x.double()
    own, common = torch.zeros_like(value), torch.zeros_like(value)
    if weight is not None:
        value, own, common = normalised(value, own, weight.double(), eps, rounds, dtype)
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
    sources = own_sources(value)
    if "cos_sin" in rounds:  # a rounded cosine serves two elements
        sources[:, 0] = x.shape[-1] / 2
    return Bound(turned, variance, common, sources)
