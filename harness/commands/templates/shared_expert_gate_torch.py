"""The stage `shared_expert_gate`: the scalar gate of the shared expert.

    out = sigmoid(hidden_states @ gate_weight.T) * shared_output

- Any strides, any number of leading dimensions; D may differ from H.
- The output is a new tensor in the dtype of shared_output; no input is modified.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage shared_expert_gate --impl FILE:shared_expert_gate
"""

from torch import Tensor


def shared_expert_gate(
    hidden_states: Tensor,  # [..., H]
    gate_weight: Tensor,  # [1, H]
    shared_output: Tensor,  # [..., D]
) -> Tensor:  # [..., D]
    gate = (hidden_states.float() @ gate_weight.float().T).sigmoid()
    return (gate * shared_output.float()).to(shared_output.dtype)


# What it promises; optional, and what is promised is judged.
shared_expert_gate.deterministic = True
