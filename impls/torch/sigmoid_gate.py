"""The output of attention gated element by element, as Qwen3-Next has it: x * sigmoid(gate)."""

import torch
from torch import Tensor

__all__ = ["sigmoid_gate"]


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate) of x and gate [T, heads, D], in fp32 and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * gate.to(wide).sigmoid()).to(x.dtype)


sigmoid_gate.graph_capturable = True
