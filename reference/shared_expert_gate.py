r"""The gate of the shared expert (Qwen2-MoE, Qwen3-Next, the Qwen3-Omni talker).

y = sigmoid(x . w) * shared_output       one scalar gate per token
"""

from torch import Tensor


def shared_expert_gate(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    """Scale each row of the shared expert's output by its gate.

    Args:
        hidden_states: [..., H]; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        gate_weight: [1, H].
        shared_output: [..., D], D may differ from H.

    Returns:
        [..., D] in the dtype of hidden_states.
    """
    gate = (hidden_states @ gate_weight.to(hidden_states.dtype).T).sigmoid()
    return gate * shared_output.to(hidden_states.dtype)
