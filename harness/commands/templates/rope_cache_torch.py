"""The stage `rope_cache`: queries and keys normalised and rotated, keys and values written to the paged cache.

    each head h of q and k:  h = q_norm * h / sqrt(mean(h^2) + eps), where there is a norm
    then, with a = position * theta^(-2i/D):  first half * cos a - second half * sin a, second * cos a + first * sin a

- Token t is written at page slots[t] // page, row slots[t] % page; a slot of -1 writes nothing.
- The two caches are the only arguments that change, and there in the slots only; any strides, those of a cache in
  [P, heads, page, D] among them.
- Returns the rotated queries as a new tensor. Positions reach 100,000: fp32 loses the angle there.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage rope_cache --impl FILE:rope_cache
"""

import torch
from torch import Tensor


def rope_cache(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hk, D]
    v: Tensor,  # [T, Hk, D]
    positions: Tensor,  # int [T]
    slots: Tensor,  # int [T]
    key_cache: Tensor,  # [P, page, Hk, D], written
    value_cache: Tensor,  # [P, page, Hk, D], written
    *,
    q_norm: Tensor | None = None,  # [D]
    k_norm: Tensor | None = None,  # [D]
    eps: float = 1e-6,
    theta: float,
) -> Tensor:  # [T, Hq, D]
    width = q.shape[2]
    powers = torch.arange(0, width, 2, dtype=torch.float64, device=q.device) / width
    angles = (positions.double()[:, None] * theta**-powers)[:, None]
    cos, sin = angles.cos().float(), angles.sin().float()

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float()
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        first, second = x.chunk(2, dim=2)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)

    keys = rotated(k, k_norm)
    written = slots >= 0
    at = slots[written].long()
    page, row = at // key_cache.shape[1], at % key_cache.shape[1]
    key_cache[page, row] = keys[written].to(key_cache.dtype)
    value_cache[page, row] = v[written].to(value_cache.dtype)
    return rotated(q, q_norm).to(q.dtype)


# What it promises; optional, and what is promised is judged.
rope_cache.rounds = ()
rope_cache.deterministic = True
