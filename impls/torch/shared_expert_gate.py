"""The gate of the shared expert: sigmoid(x . w) * shared_output, one scalar per row.

`loop` computes in fp32 and rounds once; `expression` is the line that model code has, of three kernels.
"""

import torch
from torch import Tensor

__all__ = ["expression", "loop"]


def loop(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    """The stage `shared_expert_gate`: hidden_states [..., H], gate_weight [1, H], shared_output [..., D] -> [..., D].

    Computed in fp32 and rounded once.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    gate = (hidden_states.to(wide) * gate_weight[0].to(wide)).sum(-1, keepdim=True).sigmoid()
    return (gate * shared_output.to(wide)).to(hidden_states.dtype)


loop.rounds = ()
loop.deterministic = True
loop.graph_capturable = True


def expression(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    """The stage `shared_expert_gate` in the dtype of the inputs: the logit and the gate are rounded to it."""
    return torch.sigmoid(torch.nn.functional.linear(hidden_states, gate_weight)) * shared_output


expression.graph_capturable = True
