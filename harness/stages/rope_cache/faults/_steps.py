"""Norm, rotation and the write to the cache in replaceable steps: `run` is right."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[..., Tensor]


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Every head over its root mean square, where there is a weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def angle(positions: Tensor, width: int, theta: float) -> Tensor:
    """[T, 1, D / 2], fp32 from fp64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return (positions.double()[:, None] * theta**-exponents)[:, None]


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Both halves of each head turned."""
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def write(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Rows [T, Hk, D] to their slots."""
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = rows[token].to(cache.dtype)


class Steps(NamedTuple):
    """The steps that round: an implementation with other roundings has others."""

    norm: Step = norm
    turn: Step = turn


RIGHT = Steps()


def run(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, theta: float,
    norm: Step | None = None, angle: Step = angle, turn: Step | None = None, write: Callable[..., None] = write,
    k_turn: Step | None = None, steps: Steps = RIGHT,
) -> Tensor:  # fmt: skip
    """A right implementation; the last keywords replace its steps."""
    norm, turn = norm or steps.norm, turn or steps.turn
    angles = angle(positions, q.shape[-1], theta)
    keys = (k_turn or turn)(norm(k.float(), k_norm, eps), angles)
    write(key_cache, slots, keys)
    write(value_cache, slots, v)
    return turn(norm(q.float(), q_norm, eps), angles).to(q.dtype).contiguous()
