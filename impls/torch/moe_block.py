"""A whole sparse MoE block of seven families: router, experts, and the shared expert where the weights hold one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.torch import experts as expert_variants
from moe_harness.impls.torch.router import loop as route
from moe_harness.impls.torch.shared_expert_gate import loop as gate_shared

__all__ = ["loop", "grouped_mm"]


class Rules(NamedTuple):
    """What the config's class decides: defaults of absent keys, and what is not in the config at all."""

    top_k: int | None
    renormalize: bool | None = None  # default of norm_topk_prob; None: the key is not read
    always_renormalize: bool = False
    deepseek: bool = False  # router in fp32, routing weights left in fp32, routed_scaling_factor
    scale: float = 1.0
    groups: tuple[int | None, int | None] = (None, None)
    sigmoid: bool = False


RULES = {
    "qwen2_moe": Rules(4, renormalize=False),
    "qwen3_moe": Rules(8, renormalize=False),
    "qwen3_next": Rules(10, renormalize=True),
    "qwen3_5_moe_text": Rules(8, always_renormalize=True),
    "qwen3_omni_moe_talker_text": Rules(8, renormalize=False),
    "mixtral": Rules(2, always_renormalize=True),
    "deepseek_v2": Rules(None, deepseek=True),
    "deepseek_v3": Rules(8, renormalize=True, deepseek=True, scale=2.5, groups=(8, 4), sigmoid=True),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def loop(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The stage `moe_block` with `torch:loop` for every part: hidden_states [T, H] -> [T, H].

    Raises:
        NotImplementedError: a model_type or hidden_act other than those in RULES and ACTIVATIONS.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    # The experts get fp32 rows, so that their sum and the shared expert's term are rounded together, once.
    return _block(hidden_states, weights, config, expert_variants.loop, hidden_states.to(wide))


loop.rounds = ("routing_weight",)
loop.deterministic = True


def grouped_mm(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The stage `moe_block` with `torch:grouped_mm` for the experts: hidden_states [T, H] -> [T, H].

    Raises:
        NotImplementedError: as `loop`, and fp64.
    """
    return _block(hidden_states, weights, config, expert_variants.grouped_mm, hidden_states)


grouped_mm.rounds = ("gate_up", "activation", "expert_output", "partial_sum", "routing_weight")
grouped_mm.deterministic = True


def _block(x: Tensor, weights: dict[str, Tensor], config: dict[str, Any], run: Callable, rows: Tensor) -> Tensor:
    rules = _rules(config)
    activation = _activation(config)
    topk_weights, topk_ids = _route(x, weights, config, rules)
    gate_up, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    out = run(rows, gate_up, down, topk_weights, topk_ids, activation=activation)
    shared = _shared(x, weights, activation)
    return (out if shared is None else out + shared).to(x.dtype)


def _rules(config: dict[str, Any]) -> Rules:
    if config.get("model_type") not in RULES:
        known = ", ".join(RULES)
        raise NotImplementedError(f"model_type {config.get('model_type')!r} is not supported; supported: {known}")
    return RULES[config["model_type"]]


def _activation(config: dict[str, Any]) -> str:
    name = config.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise NotImplementedError(f"hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _route(x: Tensor, weights: dict[str, Tensor], config: dict[str, Any], rules: Rules) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ weights["gate.weight"].to(wide).T
    if not rules.deepseek:
        logits = logits.to(x.dtype)
    renormalize = rules.always_renormalize
    if rules.renormalize is not None:
        renormalize = bool(config.get("norm_topk_prob", rules.renormalize))
    groups = _groups(config, rules)
    topk_weights, topk_ids = route(
        logits,
        top_k=config["num_experts_per_tok"] if rules.top_k is None else config.get("num_experts_per_tok", rules.top_k),
        scoring="sigmoid" if rules.sigmoid else "softmax",
        renormalize=renormalize,
        correction_bias=weights["gate.e_score_correction_bias"] if rules.sigmoid else None,
        num_expert_group=groups[0],
        topk_group=groups[1],
        routed_scaling_factor=config.get("routed_scaling_factor", rules.scale) if rules.deepseek else 1.0,
    )
    keep_fp32 = rules.deepseek or rules.always_renormalize
    return (topk_weights if keep_fp32 else topk_weights.to(x.dtype)), topk_ids


def _groups(config: dict[str, Any], rules: Rules) -> tuple[int | None, int | None]:
    """DeepSeek-V3 always has groups; V2 has them when topk_method says so."""
    if rules.sigmoid or (rules.deepseek and config.get("topk_method", "greedy") == "group_limited_greedy"):
        return config.get("n_group", rules.groups[0]), config.get("topk_group", rules.groups[1])
    return None, None


def _shared(x: Tensor, weights: dict[str, Tensor], activation: str) -> Tensor | None:
    """The shared expert's term in fp32, [T, H], or None."""
    prefix = next((p for p in ("shared_expert", "shared_experts") if f"{p}.down_proj.weight" in weights), None)
    if prefix is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up, down = (weights[f"{prefix}.{name}_proj.weight"].to(wide) for name in ("gate", "up", "down"))
    rows = x.to(wide)
    act = F.silu(rows @ gate.T) if activation == "silu" else F.gelu(rows @ gate.T, approximate="tanh")
    out = (act * (rows @ up.T)) @ down.T
    if "shared_expert_gate.weight" in weights:
        out = gate_shared(rows, weights["shared_expert_gate.weight"], out)
    return out
