"""Queries and keys normalised per head and rotated, keys and values written to their slots of the paged cache."""

import torch
from torch import Tensor

from moe_harness.impls.torch.rms_norm import normalised

__all__ = ["rope_cache"]


def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, theta: float,
    turned: int | None = None,
) -> Tensor:  # fmt: skip
    """The stage `rope_cache`: q [T, Hq, D], k, v [T, Hk, D], caches [P, page, Hk, D], any strides -> q' [T, Hq, D].

    Norm and rotation are done in fp32 and rounded once; angles are taken in fp64, because fp32 leaves a position of
    100,000 with an angle good to 0.004 only.

    Args:
        turned: how many of a head's elements are rotated, the first ones; None: all.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check(q, k, v, positions, slots, key_cache, value_cache)
    wide = torch.promote_types(q.dtype, torch.float32)
    turned = q.shape[2] if turned is None else turned
    exponents = torch.arange(0, turned, 2, dtype=torch.float64, device=q.device) / turned
    angles = (positions.double()[:, None] * theta**-exponents)[:, None]
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    queries, keys = (_rotated(x.to(wide), w, eps, cos, sin) for x, w in ((q, q_norm), (k, k_norm)))
    kept = slots >= 0
    at = slots[kept].long()
    page, offset = at // key_cache.shape[1], at % key_cache.shape[1]
    key_cache[page, offset] = keys[kept].to(key_cache.dtype)
    value_cache[page, offset] = v[kept].to(value_cache.dtype)
    return queries.to(q.dtype)


rope_cache.rounds = ()
rope_cache.deterministic = True
rope_cache.batch_invariant = True


def _rotated(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] normalised, where there is a weight, and turned by the angles [T, 1, R]; in its own dtype."""
    if weight is not None:
        x = normalised(x, weight, eps)
    half = cos.shape[-1]
    first, second, kept = x.tensor_split((half, 2 * half), dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, kept], dim=2)


def check(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: which ones, and what they should be.
    """
    tokens, _, width = q.shape
    heads = k.shape[1]
    wanted = {
        "k": (k, (tokens, heads, width)), "v": (v, (tokens, heads, width)), "positions": (positions, (tokens,)),
        "slots": (slots, (tokens,)), "key_cache": (key_cache, (*key_cache.shape[:2], heads, width)),
        "value_cache": (value_cache, (*key_cache.shape[:2], heads, width)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape} beside q of {tuple(q.shape)}")
    if width % 2:
        raise ValueError(f"heads of {width} elements have no two halves to rotate")
