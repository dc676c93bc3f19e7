"""transformers' own sparse MoE blocks, chosen by config["model_type"].

The block is built from its real config class on the meta device and gets the caller's tensors through
load_state_dict(assign=True, strict=True), so names and shapes are checked by transformers itself.  Its experts run on
the eager path, which takes every dtype and stride; the other two are judged in the stage `experts`.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["block"]

# model_type: (module under transformers.models, class of the config, class of the block)
CLASSES = {
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock"),
    "qwen3_next": ("qwen3_next", "Qwen3NextConfig", "Qwen3NextSparseMoeBlock"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock"),
    "qwen3_omni_moe_talker_text": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerTextConfig",
        "Qwen3OmniMoeTalkerTextSparseMoeBlock",
    ),
    "mixtral": ("mixtral", "MixtralConfig", "MixtralSparseMoeBlock"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE"),
}


def block(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The stage `moe_block`: hidden_states [T, H] -> [T, H].

    Raises:
        NotImplementedError: a model_type not in CLASSES; weights that this family's block does not have.
        ValueError: weights of other shapes than the config says.
    """
    module = _build(weights, config)
    with torch.no_grad():
        return module(hidden_states.unsqueeze(0)).squeeze(0)


block.rounds = ("gate_up", "activation", "expert_output", "weighted", "partial_sum", "routing_weight")


def _build(weights: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    model_type = config.get("model_type")
    if model_type not in CLASSES:
        raise NotImplementedError(f"model_type {model_type!r} is not supported; supported: {', '.join(CLASSES)}")
    folder, config_class, block_class = CLASSES[model_type]
    configuration = import_module(f"transformers.models.{folder}.configuration_{folder}")
    modeling = import_module(f"transformers.models.{folder}.modeling_{folder}")
    keys = {**{key: value for key, value in config.items() if key != "model_type"}, **_sizes(model_type, weights)}
    real_config = getattr(configuration, config_class)(**keys, experts_implementation="eager")
    with torch.device("meta"):
        module = getattr(modeling, block_class)(real_config).eval().requires_grad_(False)
    _load(module, weights)
    return module


def _sizes(model_type: str, weights: dict[str, Tensor]) -> dict[str, int]:
    """The config's sizes as the tensors have them; attention is not part of the block and only has to be valid."""
    num_experts, hidden_size = weights["gate.weight"].shape
    intermediate_size = weights["experts.down_proj"].shape[2]
    sizes = {"hidden_size": hidden_size, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes["intermediate_size" if model_type == "mixtral" else "moe_intermediate_size"] = intermediate_size
    sizes[_experts_key(model_type)] = num_experts
    if "shared_expert.down_proj.weight" in weights:
        sizes["shared_expert_intermediate_size"] = weights["shared_expert.down_proj.weight"].shape[1]
    return sizes


def _experts_key(model_type: str) -> str:
    if model_type.startswith("deepseek"):
        return "n_routed_experts"
    return "num_local_experts" if model_type == "mixtral" else "num_experts"


def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    held, given = set(module.state_dict()), set(weights)
    if held != given:
        raise NotImplementedError(
            f"{type(module).__name__} lacks {sorted(given - held)} and needs {sorted(held - given)} of the weights"
        )
    _match_shared_width(module, weights)
    try:
        module.load_state_dict(weights, assign=True, strict=True)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the config: {error}") from error


def _match_shared_width(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give DeepSeek's meta parameters the width of the tensors: its config can only say n_shared_experts times I."""
    for name, parameter in list(module.named_parameters()):
        if name.startswith("shared_experts.") and parameter.shape != weights[name].shape:
            shared, projection, _ = name.split(".")
            layer = getattr(getattr(module, shared), projection)
            layer.weight = nn.Parameter(torch.empty_like(weights[name], device="meta"), requires_grad=False)
