"""Put a function of the stage experts or moe_block into a live transformers model: in every layer, or in one."""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from moe_harness.harness.core.errors import CannotJudge, UsageError

ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
}  # fmt: skip
NAME = "moe_harness_gate"  # under which a function is entered in transformers' table of experts implementations


def plug(model: nn.Module, stage: str, function: Callable[..., Any], layer: int | None) -> Callable[[], None]:
    """Let `function` compute the experts (stage experts, or hook for transformers' own signature) or whole blocks.

    Returns:
        What takes it out again.

    Raises:
        UsageError: there is no such layer.
        CannotJudge: the model has no experts in a layout that the contract knows.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise CannotJudge(f"{type(model).__name__} has no sparse block with experts.gate_up_proj and experts.down_proj")
    if layer is not None and not 0 <= layer < len(blocks):
        raise UsageError(f"layer {layer} does not exist; the model has {len(blocks)} sparse layers, from 0")
    if stage == "moe_block":
        config = model.config.to_dict()  # type: ignore[operator,union-attr]
        changed = blocks if layer is None else blocks[layer : layer + 1]
        for block in changed:
            block.forward = types.MethodType(_block_forward(function, config), block)
        return lambda: _restore(changed)
    adapted = function if stage == "hook" else _experts_forward(function)
    for block in blocks:
        _check_layout(block.experts)
    if layer is None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, adapted)
        model.set_experts_implementation(NAME)  # type: ignore[operator]
        return lambda: model.set_experts_implementation("eager")  # type: ignore[operator]
    experts = blocks[layer].experts
    experts.forward = types.MethodType(adapted, experts)
    return lambda: _restore([experts])


def _restore(modules: Sequence[Any]) -> None:
    for module in modules:
        del module.forward  # the class's own is seen again


def _blocks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "gate_up_proj") and hasattr(experts, "down_proj"):
            yield module


def _check_layout(experts: Any) -> None:
    """What the contract's experts cannot express (CannotJudge)."""
    for flag, wanted in (("has_gate", True), ("has_bias", False), ("is_concatenated", True)):
        if getattr(experts, flag, wanted) != wanted:
            raise CannotJudge(f"the model's experts have {flag} = {not wanted}, which the stage experts does not have")
    if type(experts.act_fn).__name__ not in ACTIVATIONS:
        raise CannotJudge(f"the model's experts use {type(experts.act_fn).__name__}, which is none of the stage's")


def _experts_forward(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """transformers' call as one of the contract's."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if getattr(self, "is_transposed", False):
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return function(
            hidden_states, gate_up, down, top_k_weights, top_k_index,
            activation=ACTIVATIONS[type(self.act_fn).__name__],
        )  # fmt: skip

    return forward


def _block_forward(function: Callable[..., Any], config: dict[str, Any]) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return function(flat, dict(self.state_dict()), config).view_as(hidden_states)

    return forward
