"""A right implementation of the stage `experts` whose every step can be replaced; holds no fault itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.emulation import matmul, wide


def locate(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Local ids, [T, k], -1 for every slot that contributes nothing."""
    ids = topk_ids.long()
    if expert_map is None:
        return ids
    return torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])


def select(ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """The (tokens, slots) that an expert works on."""
    tokens, slots = (ids == expert).nonzero(as_tuple=True)
    return tokens, slots


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[g; u]: the first half is the gate."""
    gate, up = rows.chunk(2, -1)
    return gate, up


def act(gate: Tensor, activation: str) -> Tensor:
    """The activation of the contract."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}")
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(g) * u."""
    return act(gate, activation) * up


def live(topk_weights: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights with the masked ones replaced, not multiplied, by 0."""
    return topk_weights.to(dtype).masked_fill(ids < 0, 0)


def combine(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
    """Weighted sum over the slots, [T, k, H] -> [T, H]."""
    return (live(topk_weights, ids, slots.dtype)[..., None] * slots).sum(1)


class Steps(NamedTuple):
    """The steps that round: an implementation with other roundings has others."""

    matmul: Callable[[Tensor, Tensor], Tensor] = matmul
    gated: Callable[[Tensor, Tensor, str], Tensor] = gated
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] = combine


RIGHT = Steps()


def run(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    steps: Steps = RIGHT,
    locate: Callable[[Tensor, Tensor | None], Tensor] = locate,
    select: Callable[[Tensor, int], tuple[Tensor, Tensor]] = select,
    first: Callable[[Tensor, Tensor], Tensor] | None = None,
    split: Callable[[Tensor], tuple[Tensor, Tensor]] = halves,
    glu: Callable[[Tensor, Tensor, str], Tensor] | None = None,
    second: Callable[[Tensor, Tensor], Tensor] | None = None,
    slots: Tensor | None = None,
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """A right implementation; every keyword after `steps` replaces one of its steps."""
    first, second = first or steps.matmul, second or steps.matmul
    glu, combine = glu or steps.gated, combine or steps.combine
    ids = locate(topk_ids, expert_map)
    if slots is None:
        slots = hidden_states.new_zeros(*ids.shape, down_proj.shape[1], dtype=wide(hidden_states))
    for expert in ids[ids >= 0].unique().tolist():
        tokens, places = select(ids, expert)
        gate, up = split(first(hidden_states[tokens], gate_up_proj[expert]))
        slots[tokens, places] = second(glu(gate, up, activation), down_proj[expert]).to(slots.dtype)
    return combine(slots, topk_weights, ids).to(hidden_states.dtype)
