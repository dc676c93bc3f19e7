r"""The routed experts: a gated MLP per expert, run on the rows routed to it and summed with the routing weights.

    [g; u] = gate_up_proj[e] @ x[t]          g, u: [I],  g is the first half
    a      = act(g) * u                      [I]
    o      = down_proj[e] @ a                [H]
    out[t] = sum over slots j of topk_weights[t, j] * o,   e = topk_ids[t, j]  (through expert_map where given)

An id of -1 contributes nothing, whatever its weight.  The same expert twice in a row counts twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertSteps(NamedTuple):
    """Every intermediate value of one expert on its rows; the error model of the harness walks along them."""

    gate: Tensor  # [rows, I]
    up: Tensor  # [rows, I]
    activated: Tensor  # act(gate), [rows, I]
    hidden: Tensor  # act(gate) * up, [rows, I]
    output: Tensor  # [rows, H]


def activate(gate: Tensor, activation: str) -> Tensor:
    """act(gate), elementwise: "silu" is g * sigmoid(g), "gelu_tanh" the tanh approximation of GELU."""
    if activation == "silu":
        return F.silu(gate)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh")
    raise ValueError(f"activation is {activation!r}, but should be 'silu' or 'gelu_tanh'")


def expert_steps(rows: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> ExpertSteps:
    """One expert on `rows` [n, H] with gate_up [2I, H] and down [H, I], in the dtype of `rows`."""
    gate, up = (rows @ gate_up.to(rows.dtype).T).chunk(2, dim=-1)
    activated = activate(gate, activation)
    hidden = activated * up
    return ExpertSteps(gate, up, activated, hidden, hidden @ down.to(rows.dtype).T)


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Indices into the local weights, [T, k]; -1 where a slot is masked or its expert lives elsewhere."""
    if expert_map is None:
        return topk_ids
    mapped = expert_map.long()[topk_ids.clamp(min=0).long()]
    return mapped.masked_fill(topk_ids < 0, -1)


def routed_rows(ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) for each expert that has any row; a token appears once per slot."""
    for expert in ids[ids >= 0].unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        yield expert, tokens, slots


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts.

    Args:
        hidden_states: [T, H]; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        gate_up_proj: [E_local, 2 * I, H], gate rows first.  Any dtype; an expert is converted when it is used.
        down_proj: [E_local, H, I].
        topk_weights: [T, k].
        topk_ids: [T, k], local ids, or global ones where `expert_map` [E] gives the local id or -1.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: unknown `activation`.
    """
    out = torch.zeros_like(hidden_states, memory_format=torch.contiguous_format)
    for expert, tokens, slots in routed_rows(local_ids(topk_ids, expert_map)):
        steps = expert_steps(hidden_states[tokens], gate_up_proj[expert], down_proj[expert], activation)
        out.index_add_(0, tokens, topk_weights[tokens, slots, None].to(out.dtype) * steps.output)
    return out
