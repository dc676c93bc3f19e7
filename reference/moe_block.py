r"""A whole sparse MoE block: router, experts and, where the weights hold one, the shared expert.

    logits[t]   = gate.weight @ x[t]                                       [E]
    w, ids      = router(logits)                                           [T, k], by the rule of the model family
    out[t]      = sum over slots j of  w[t, j] * expert_ids[t, j](x[t])
                + sigmoid(shared_expert_gate . x[t]) * shared_expert(x[t])   (Qwen2-MoE, Qwen3-Next, 3.5, Omni talker)
                + shared_experts(x[t])                                       (DeepSeek, no gate)

What differs between the families is data, in `FAMILIES`; the reading of record is transformers 5.17.  A key that a
config lacks takes the default of the family's config class there, so `norm_topk_prob` is never assumed.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_harness.reference.experts import activate, experts
from moe_harness.reference.router import router
from moe_harness.reference.shared_expert_gate import shared_expert_gate

Weights = dict[str, Tensor]
Config = dict[str, Any]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SHARED_EXPERT = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Family:
    """What one model family does that another does not.

    `renormalize` is "never", "always" or "config" (the key norm_topk_prob).  `router_in_fp32`: hidden states and gate
    weight are widened before the product; otherwise the logits have the model's dtype.  `weights_in_fp32`: the experts
    get the routing weights in fp32; otherwise they are rounded to the model's dtype first.
    """

    defaults: Config
    scoring: str = "softmax"
    renormalize: str = "config"
    renormalize_epsilon: float = 0.0  # added to the sum that the weights are divided by
    correction_bias: bool = False
    router_in_fp32: bool = False
    weights_in_fp32: bool = False


FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family({"num_experts_per_tok": 4, "norm_topk_prob": False}),
    "qwen3_moe": Family({"num_experts_per_tok": 8, "norm_topk_prob": False}),
    "qwen3_next": Family({"num_experts_per_tok": 10, "norm_topk_prob": True}),
    "qwen3_5_moe_text": Family({"num_experts_per_tok": 8}, renormalize="always"),  # there is no key norm_topk_prob
    "qwen3_omni_moe_talker_text": Family({"num_experts_per_tok": 8, "norm_topk_prob": False}),
    "mixtral": Family({"num_experts_per_tok": 2}, renormalize="always", weights_in_fp32=True),
    # transformers reads norm_topk_prob into the config of DeepSeek-V2 and then never uses it.
    "deepseek_v2": Family(
        {"topk_method": "greedy", "n_group": None, "topk_group": None, "routed_scaling_factor": 1.0},
        renormalize="never",
        router_in_fp32=True,
        weights_in_fp32=True,
    ),
    "deepseek_v3": Family(
        {
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "topk_method": "noaux_tc",
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
        },
        scoring="sigmoid",
        renormalize_epsilon=1e-20,
        correction_bias=True,
        router_in_fp32=True,
        weights_in_fp32=True,
    ),
}


@dataclass(frozen=True)
class RoutingRule:
    """The router's keyword arguments, but for the correction bias, which is a weight."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_expert_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0

    def as_keywords(self) -> dict[str, Any]:
        return asdict(self)


def family(config: Config) -> Family:
    """The family that config["model_type"] names; ValueError with the known ones otherwise."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}, but should be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def routing_rule(config: Config) -> RoutingRule:
    """How this model routes.

    Raises:
        ValueError: unknown model_type or topk_method, or num_experts_per_tok missing where the class has no default.
    """
    kind = family(config)
    keys = {**kind.defaults, **config}
    if keys.get("num_experts_per_tok") is None:
        raise ValueError(f"the config of {config['model_type']} has no num_experts_per_tok, and its class no default")
    renormalize = kind.renormalize == "always" or (kind.renormalize == "config" and bool(keys["norm_topk_prob"]))
    groups = _groups(keys) if "topk_method" in kind.defaults else (None, None)
    scale = keys["routed_scaling_factor"] if "routed_scaling_factor" in kind.defaults else 1.0
    return RoutingRule(keys["num_experts_per_tok"], kind.scoring, renormalize, *groups, float(scale))


def _groups(keys: Config) -> tuple[int | None, int | None]:
    """(num_expert_group, topk_group).  DeepSeek-V2 says in topk_method whether it has groups; V3 always has."""
    if keys["topk_method"] == "greedy" and keys["model_type"] == "deepseek_v2":
        return None, None
    if keys["model_type"] == "deepseek_v3" or keys["topk_method"] == "group_limited_greedy":
        return keys["n_group"], keys["topk_group"]
    raise ValueError(f"topk_method is {keys['topk_method']!r}, but should be 'greedy' or 'group_limited_greedy'")


def activation(config: Config) -> str:
    """The contract's name of config["hidden_act"]; "silu" where the key is absent, as in every family here."""
    name = config.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {name!r}, but should be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def router_logits(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    """[T, H] -> [T, E], in the dtype of hidden_states, or at least fp32 where the family widens its router."""
    dtype = hidden_states.dtype
    if family(config).router_in_fp32:
        dtype = torch.promote_types(dtype, torch.float32)
    return hidden_states.to(dtype) @ weights["gate.weight"].to(dtype).T


def correction_bias(weights: Weights, config: Config) -> Tensor | None:
    """The bias [E] that only the selection sees, or None for a family without one."""
    return weights["gate.e_score_correction_bias"] if family(config).correction_bias else None


def routing(logits: Tensor, weights: Weights, config: Config) -> tuple[Tensor, Tensor]:
    """topk_weights and topk_ids, both [T, k], from the logits [T, E]."""
    rule, epsilon = routing_rule(config), family(config).renormalize_epsilon
    bias = correction_bias(weights, config)
    if not (rule.renormalize and epsilon):
        return router(logits, correction_bias=bias, **rule.as_keywords())
    plain = replace(rule, renormalize=False, routed_scaling_factor=1.0)
    scores, ids = router(logits, correction_bias=bias, **plain.as_keywords())
    return scores / (scores.sum(-1, keepdim=True) + epsilon) * rule.routed_scaling_factor, ids


def gated_mlp(hidden_states: Tensor, weights: Weights, prefix: str, act: str) -> Tensor:
    """down_proj @ (act(gate_proj @ x) * (up_proj @ x)) with the weights under `prefix`, [T, H] -> [T, H]."""
    gate, up, down = (weights[f"{prefix}.{name}"].to(hidden_states.dtype) for name in SHARED_EXPERT)
    return (activate(hidden_states @ gate.T, act) * (hidden_states @ up.T)) @ down.T


def shared_expert(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor | None:
    """The shared expert's term of the output, gate included, [T, H]; None where the weights hold no shared expert."""
    act = activation(config)
    if "shared_experts.down_proj.weight" in weights:  # DeepSeek: several merged in one MLP, ungated
        return gated_mlp(hidden_states, weights, "shared_experts", act)
    if "shared_expert.down_proj.weight" in weights:
        mlp = gated_mlp(hidden_states, weights, "shared_expert", act)
        return shared_expert_gate(hidden_states, weights["shared_expert_gate.weight"], mlp)
    return None


def expected_weights(weights: Weights, config: Config) -> set[str]:
    """Names that a block of this family has, given which shared expert the weights hold."""
    names = {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    if family(config).correction_bias:
        names.add("gate.e_score_correction_bias")
    for prefix, gate in (("shared_experts", set()), ("shared_expert", {"shared_expert_gate.weight"})):
        if any(name.startswith(f"{prefix}.") for name in weights):
            names |= gate | {f"{prefix}.{name}" for name in SHARED_EXPERT}
    return names


def check_weights(weights: Weights, config: Config) -> None:
    """ValueError that lists the missing and the left-over names: a weight is never ignored in silence."""
    expected = expected_weights(weights, config)
    if set(weights) != expected:
        missing, extra = sorted(expected - set(weights)), sorted(set(weights) - expected)
        raise ValueError(f"weights of a {config['model_type']} block: missing {missing}, left over {extra}")


def moe_block(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    """The block's output for `hidden_states`.

    Args:
        hidden_states: [T, H]; all arithmetic is done in its dtype (the scores at least in fp32), so pass fp64 for an
            oracle.
        weights: checkpoint names without the layer prefix.  gate.weight [E, H], experts.gate_up_proj [E, 2I, H],
            experts.down_proj [E, H, I]; gate.e_score_correction_bias [E] (DeepSeek-V3); shared_expert.{gate,up}_proj
            .weight [D, H], shared_expert.down_proj.weight [H, D], shared_expert_gate.weight [1, H];
            shared_experts.* for DeepSeek.
        config: the Hugging Face config's own keys, of which `model_type` is required.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: unknown model_type, topk_method or hidden_act; weights missing or left over.
    """
    check_weights(weights, config)
    topk_weights, topk_ids = routing(router_logits(hidden_states, weights, config), weights, config)
    if not family(config).weights_in_fp32:
        topk_weights = topk_weights.to(hidden_states.dtype)
    gate_up, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    out = experts(hidden_states, gate_up, down, topk_weights, topk_ids, activation=activation(config))
    shared = shared_expert(hidden_states, weights, config)
    return out if shared is None else out + shared
