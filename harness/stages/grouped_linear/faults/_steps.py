"""A right implementation of the stage `grouped_linear` whose every step can be replaced; holds no fault itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import matmul


def owners(group_sizes: Tensor, rows: int) -> Tensor:
    """The expert of each row, [S]."""
    return torch.searchsorted(group_sizes.long().cumsum(0), torch.arange(rows, device=group_sizes.device), right=True)


def biased(rows: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    """Add the expert's bias."""
    return rows if bias is None else rows + bias[expert].to(rows.dtype)


class Steps(NamedTuple):
    """The step that rounds: an implementation with other roundings has another."""

    matmul: Callable[[Tensor, Tensor], Tensor] = matmul


RIGHT = Steps()


def run(
    x: Tensor,
    weight: Tensor,
    group_sizes: Tensor,
    *,
    bias: Tensor | None = None,
    steps: Steps = RIGHT,
    owners: Callable[[Tensor, int], Tensor] = owners,
    multiply: Callable[[Tensor, Tensor], Tensor] | None = None,
    add: Callable[[Tensor, Tensor | None, int], Tensor] = biased,
) -> Tensor:
    """A right implementation; an owner outside [0, E) leaves its row at 0."""
    multiply, experts = multiply or steps.matmul, owners(group_sizes, x.shape[0])
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        rows = (experts == expert).nonzero().flatten()
        if len(rows):
            out[rows] = add(multiply(x[rows], weight[expert]), bias, expert).to(x.dtype)
    return out
