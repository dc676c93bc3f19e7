"""The signature of an implementation of the stage `shared_expert_gate`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def shared_expert_gate(hidden_states: "Tensor", gate_weight: "Tensor", shared_output: "Tensor") -> "Tensor": ...
