"""The Triton experts inside transformers: `register()`, then `experts_implementation="moe_harness_triton"`.

Any model whose experts keep `gate_up_proj` [E, 2I, H] (gate rows first) and `down_proj` [E, H, I], or both transposed,
without biases runs on it, by `from_pretrained(..., experts_implementation=NAME)` or
`model.set_experts_implementation(NAME)`: in `generate`, continuous batching and evaluation.  Others are refused when
they are first called.  Under expert parallelism transformers gives a slot of another rank the index num_experts and the
weight 0; such an index is outside the local experts, so the kernels leave the slot out.  Nothing waits for the device,
so a decoding step can be captured in a CUDA graph.
"""

from typing import Any

from torch import Tensor, nn

from moe_harness.impls.triton.experts import experts

__all__ = ["NAME", "forward", "register"]

NAME = "moe_harness_triton"
# What transformers' decorator sets on a module of experts, and what the kernels take.
LAYOUT = {"has_gate": True, "has_bias": False, "is_concatenated": True}
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def layout_problem(module: nn.Module) -> str | None:
    """Why the kernels cannot run this module's layout, or None."""
    for flag, wanted in LAYOUT.items():
        found = getattr(module, flag, wanted)
        if found != wanted:
            return f"{flag} is {found}, but {NAME} runs {flag} = {wanted} only"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return f"it gates with its own {gate.__qualname__}, but {NAME} runs act(gate) * up only"
    if type(module.act_fn).__name__ not in ACTIVATIONS:
        return f"act_fn is {type(module.act_fn).__name__}, but {NAME} runs {', '.join(ACTIVATIONS)} only"
    return None


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' forward as transformers calls it.

    Args:
        self: the module of experts, an nn.Module.
        hidden_states: [T, H].
        top_k_index: int64 [T, k], num_experts for a slot of another rank.
        top_k_weights: [T, k].

    Returns:
        [T, H].

    Raises:
        NotImplementedError: a layout or an activation that the kernels do not run.
    """
    problem = layout_problem(self)
    if problem is not None:
        raise NotImplementedError(f"{type(self).__name__}: {problem}; choose another experts_implementation for it")
    gate_up, down = self.gate_up_proj, self.down_proj
    if getattr(self, "is_transposed", False):
        # The kernels honour strides; such weights are read without the copy engine.
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    activation = ACTIVATIONS[type(self.act_fn).__name__]
    return experts(hidden_states, gate_up, down, top_k_weights, top_k_index, activation=activation)


def register() -> str:
    """Make NAME known to transformers and return it; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    return NAME
