"""Root mean square normalisation in replaceable steps: `run` is right."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def root(s: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(s^2) + eps), [..., 1]."""
    return torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)


def scale(s: Tensor, weight: Tensor) -> Tensor:
    """Rows over their root mean square, times the weight."""
    return s * weight


class Steps(NamedTuple):
    """The steps that round: an implementation with other roundings has others."""

    root: Callable[[Tensor, float], Tensor] = root
    scale: Callable[[Tensor, Tensor], Tensor] = scale


RIGHT = Steps()


def run(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None,
    root: Callable[[Tensor, float], Tensor] | None = None, scale: Callable[[Tensor, Tensor], Tensor] | None = None,
    prepared: Callable[[Tensor], Tensor] = lambda s: s, steps: Steps = RIGHT,
) -> Any:  # fmt: skip
    """A right implementation; `root`, `scale` and `prepared`, what becomes of a row first, replace its steps."""
    total = x if residual is None else x + residual
    root, scale = root or steps.root, scale or steps.scale
    wide = prepared(total.float())
    out = scale(wide * root(wide, eps), weight.float()).to(x.dtype)
    return out.contiguous() if residual is None else (out.contiguous(), total.contiguous())
