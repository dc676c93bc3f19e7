r"""From the projection to attention: heads of queries and keys normalised (Qwen3) and rotated, keys and values kept.

    q', k' = rotate(rms_norm(q), position), rotate(rms_norm(k), position)     rms_norm per head, where it has a weight
    key_cache[slot], value_cache[slot] = k', v                                slot = page index * page size + offset

Rotary embedding (Su et al., https://arxiv.org/abs/2104.09864) in the form of two halves (GPT-NeoX, Llama, Qwen):
element i of the first half and element i of the second are one plane, turned by the angle position * theta^(-2 i / D).
"""

import torch
from torch import Tensor

from moe_harness.reference.rms_norm import normalise


def angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """Angle of each plane at each position, fp64 [T, width / 2]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.double()[:, None] * theta**-exponents


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn each plane of x [T, heads, D] by the angle of its token's position; the length of a head stays as it is."""
    turn = angles(positions, x.shape[-1], theta)[:, None]
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, theta: float,
) -> Tensor:  # fmt: skip
    """Normalise and rotate q and k, write k and v to their slots.

    Args:
        q: [T, Hq, D]; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        k, v: [T, Hk, D].
        positions: int [T], of each token in its own sequence.
        slots: int [T], where the token is kept; -1 for one that is not.  Slots of one call are distinct.
        key_cache, value_cache: [P, page, Hk, D], the only arguments changed.
        q_norm, k_norm: [D], weights of the normalisation of every head.

    Returns:
        q' [T, Hq, D].
    """
    q, k = (x if w is None else normalise(x, w, eps) for x, w in ((q, q_norm), (k.to(q.dtype), k_norm)))
    keys = rotate(k, positions, theta)
    page_size = key_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key_cache[slot // page_size, slot % page_size] = keys[token].to(key_cache.dtype)
            value_cache[slot // page_size, slot % page_size] = v[token].to(value_cache.dtype)
    return rotate(q, positions, theta)
