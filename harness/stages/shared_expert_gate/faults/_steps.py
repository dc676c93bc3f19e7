"""A right implementation of the stage `shared_expert_gate` whose every step can be replaced; holds no fault itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import wide


def dot(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """The gate's logit, [..., 1], in fp32 or wider."""
    kind = wide(hidden_states)
    return hidden_states.to(kind) @ gate_weight.to(kind).T


class Steps(NamedTuple):
    """The step that rounds: an implementation with other roundings has another."""

    dot: Callable[[Tensor, Tensor], Tensor] = dot


RIGHT = Steps()


def run(
    hidden_states: Tensor,
    gate_weight: Tensor,
    shared_output: Tensor,
    *,
    steps: Steps = RIGHT,
    dot: Callable[[Tensor, Tensor], Tensor] | None = None,
    squash: Callable[[Tensor], Tensor] = torch.sigmoid,
    scale: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """A right implementation; every keyword after `steps` replaces one of its steps."""
    gate = squash((dot or steps.dot)(hidden_states, gate_weight))
    return scale(gate, shared_output.to(gate.dtype)).to(hidden_states.dtype)
