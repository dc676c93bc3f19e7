"""The Triton experts inside transformers: `register()`, then `experts_implementation="moe_harness_triton"`.

Any model whose experts keep `gate_up_proj` [E, 2I, H] (gate rows first) and `down_proj` [E, H, I] without biases
runs on it, by `from_pretrained(..., experts_implementation=NAME)` or `model.set_experts_implementation(NAME)`: in
`generate`, continuous batching and evaluation.  Under expert parallelism transformers gives a slot of another rank the
index num_experts and the weight 0; such an index is outside the local experts, so the kernels leave the slot out.
Nothing waits for the device, so a decoding step can be captured in a CUDA graph.
"""

from torch import Tensor, nn

from impls.triton.experts import experts

__all__ = ["NAME", "forward", "register"]

NAME = "moe_harness_triton"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What transformers' decorator sets on a module of experts, and what the kernels take.
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def layout_problem(module: nn.Module) -> str | None:
    """Why the kernels cannot run this module's layout, or None."""
    for flag, wanted in LAYOUT.items():
        found = getattr(module, flag, wanted)
        if found != wanted:
            return f"{flag} is {found}, but {NAME} runs {flag} = {wanted} only"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return f"it gates with its own {gate.__qualname__}, but {NAME} runs act(gate) * up only"
    return None


def activation_name(module: nn.Module) -> str:
    """The kernels' name of the module's activation.

    Raises:
        NotImplementedError: another activation than SiLU or the tanh approximation of GELU.
    """
    act = module.act_fn
    if isinstance(act, nn.SiLU) or type(act).__name__ in ("SiLUActivation", "SiLU"):
        return "silu"
    if type(act).__name__ in ("GELUTanh", "NewGELUActivation") or getattr(act, "approximate", None) == "tanh":
        return "gelu_tanh"
    hidden_act = getattr(getattr(module, "config", None), "hidden_act", None)
    if hidden_act in ACTIVATIONS:
        return ACTIVATIONS[hidden_act]
    raise NotImplementedError(f"act_fn is {type(act).__name__}, but {NAME} runs SiLU and GELU's tanh approximation")


def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' forward as transformers calls it.

    Args:
        self: the module of experts.
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
        raise NotImplementedError(f"{type(self).__name__}: {problem}")
    return experts(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_weights, top_k_index, activation=activation_name(self)
    )


def register() -> str:
    """Make NAME known to transformers and return it; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    return NAME
