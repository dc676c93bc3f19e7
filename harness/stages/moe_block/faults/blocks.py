"""Faults of the whole block: flags read from the config, scaling, the shared expert and its gate.

`run` is a right implementation whose every step can be replaced.  Its parts are the reference's own: what goes wrong
in a block is how the parts are put together.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import wide
from moe_harness.reference import moe_block as parts
from moe_harness.reference.experts import experts
from moe_harness.reference.router import router

BUGS = "https://github.com/"
GATED = ("qwen2_moe", "qwen3_next", "qwen3_omni_moe_talker_text")
Weights = dict[str, Tensor]
Config = dict[str, Any]
Routing = tuple[Tensor, Tensor]


def route(logits: Tensor, weights: Weights, config: Config) -> Routing:
    """Routing by the rule of the family."""
    return parts.routing(logits, weights, config)


def route_with(logits: Tensor, weights: Weights, config: Config, **changes: Any) -> Routing:
    """Routing by a changed rule."""
    rule = replace(parts.routing_rule(config), **changes)
    return router(logits, correction_bias=parts.correction_bias(weights, config), **rule.as_keywords())


def scale_of(config: Config) -> float:
    """The routed scaling factor of the model."""
    return parts.routing_rule(config).routed_scaling_factor


def routed(x: Tensor, weights: Weights, routing: Routing, config: Config) -> Tensor:
    """The routed experts' sum."""
    stacked = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    return experts(x, *stacked, *routing, activation=parts.activation(config))


def shared(x: Tensor, weights: Weights, config: Config) -> Tensor:
    """The shared expert's term, 0 for a block without one."""
    term = parts.shared_expert(x, weights, config)
    return torch.zeros_like(x) if term is None else term


def ungated(x: Tensor, weights: Weights, config: Config) -> Tensor:
    """The shared expert's term without its gate."""
    for prefix in ("shared_expert", "shared_experts"):
        if f"{prefix}.down_proj.weight" in weights:
            return parts.gated_mlp(x, weights, prefix, parts.activation(config))
    return torch.zeros_like(x)


def run(
    hidden_states: Tensor,
    weights: Weights,
    config: Config,
    *,
    logits: Callable[[Tensor, Weights, Config], Tensor] = parts.router_logits,
    route: Callable[[Tensor, Weights, Config], Routing] = route,
    routed: Callable[[Tensor, Weights, Routing, Config], Tensor] = routed,
    shared: Callable[[Tensor, Weights, Config], Tensor] = shared,
    merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Tensor:
    """A right implementation, in fp32 but for the logits; every keyword replaces one of its steps."""
    parts.check_weights(weights, config)
    routing = route(logits(hidden_states, weights, config), weights, config)
    x = hidden_states.to(wide(hidden_states))
    return merge(routed(x, weights, routing, config), shared(x, weights, config)).to(hidden_states.dtype)


# Routing as the config says -------------------------------------------------------------------------------------


@fault(
    "moe_block",
    "config",
    source=BUGS + "leonickson1/Swiftlet/pull/6",
    condition="qwen3_next without the key norm_topk_prob",
    consequence="An absent norm_topk_prob is read as False where the family's default is True.",
    shows={"family": "qwen3_next"},
    hidden=("family='qwen3_moe'", "norm_topk_prob=True"),
)
def absent_norm_topk_prob_is_false(*call: Any) -> Tensor:
    def without(logits: Tensor, weights: Weights, config: Config) -> Routing:
        if config["model_type"] == "qwen3_next" and "norm_topk_prob" not in config:
            return route_with(logits, weights, config, renormalize=False)
        return route(logits, weights, config)

    return run(*call, route=without)


@fault(
    "moe_block",
    "config",
    source=BUGS + "flashinfer-ai/flashinfer/pull/2889",
    condition="norm_topk_prob False, as in Qwen2-MoE",
    consequence="Renormalisation is hard-coded, as the most used model wants it.",
    shows={"family": "qwen2_moe"},
    hidden=("norm_topk_prob=True", "family='mixtral'"),
)
def norm_topk_prob_hard_coded(*call: Any) -> Tensor:
    def always(logits: Tensor, weights: Weights, config: Config) -> Routing:
        return route_with(logits, weights, config, renormalize=True)

    return run(*call, route=always)


@fault(
    "moe_block",
    "config",
    condition="mixtral",
    shows={"family": "mixtral"},
    hidden=("family='qwen3_moe'",),
    consequence="Mixtral's config has no norm_topk_prob, and the weights are not renormalised.",
)
def mixtral_not_renormalised(*call: Any) -> Tensor:
    def without(logits: Tensor, weights: Weights, config: Config) -> Routing:
        if config["model_type"] == "mixtral":
            return route_with(logits, weights, config, renormalize=False)
        return route(logits, weights, config)

    return run(*call, route=without)


@fault(
    "moe_block",
    "config",
    condition="num_experts_per_tok above 2",
    shows={"k": 4},
    hidden=("k=2",),
    source=BUGS + "JieShibo/MoLE/issues/7",
    consequence="The number of experts per token is a constant of 2.",
)
def two_experts_per_token(*call: Any) -> Tensor:
    def two(logits: Tensor, weights: Weights, config: Config) -> Routing:
        return route_with(logits, weights, config, top_k=min(2, parts.routing_rule(config).top_k))

    return run(*call, route=two)


@fault(
    "moe_block",
    "config",
    condition="deepseek_v3 with fewer groups kept than there are",
    shows={"family": "deepseek_v3", "E": 16, "n_group": 4, "topk_group": 1},
    hidden=("family='qwen3_moe'",),
    consequence="n_group and topk_group are not read: experts come from all groups.",
)
def config_groups_ignored(*call: Any) -> Tensor:
    def anywhere(logits: Tensor, weights: Weights, config: Config) -> Routing:
        return route_with(logits, weights, config, num_expert_group=None, topk_group=None)

    return run(*call, route=anywhere)


@fault(
    "moe_block",
    "config",
    condition="deepseek_v3 with a correction bias",
    shows={"family": "deepseek_v3"},
    hidden=("family='qwen3_moe'",),
    consequence="e_score_correction_bias is loaded and not passed to the router.",
)
def correction_bias_not_passed(*call: Any) -> Tensor:
    def unbiased(logits: Tensor, weights: Weights, config: Config) -> Routing:
        bias = parts.correction_bias(weights, config)
        if bias is None:
            return route(logits, weights, config)
        return route(logits, {**weights, "gate.e_score_correction_bias": torch.zeros_like(bias)}, config)

    return run(*call, route=unbiased)


@fault(
    "moe_block",
    "weighting",
    condition="k > 1",
    shows={},
    hidden=("k=1",),
    consequence="The block hands the router's weights on in ascending order of ids it did not sort.",
)
def block_flips_weights(*call: Any) -> Tensor:
    def flipped(logits: Tensor, weights: Weights, config: Config) -> Routing:
        topk_weights, topk_ids = route(logits, weights, config)
        return topk_weights.flip(1), topk_ids

    return run(*call, route=flipped)


@fault(
    "moe_block",
    "routing",
    source=BUGS + "GeeeekExplorer/nano-vllm/pull/116",
    condition="always",
    shows={},
    consequence="The router's gate is sharded like a row-parallel layer: logits are partial sums over half of H.",
)
def gate_sees_half_of_h(*call: Any) -> Tensor:
    def partial(x: Tensor, weights: Weights, config: Config) -> Tensor:
        half = -(-x.shape[1] // 2)
        return parts.router_logits(x[:, :half], {"gate.weight": weights["gate.weight"][:, :half]}, config)

    return run(*call, logits=partial)


# Scaling --------------------------------------------------------------------------------------------------------


@fault(
    "moe_block",
    "scaling",
    source=BUGS + "sgl-project/sglang/pull/8511",
    condition="routed_scaling_factor other than 1",
    shows={"family": "deepseek_v3"},
    hidden=("routed_scaling_factor=1.0", "family='qwen3_moe'"),
    consequence="Router, experts and model each believe that another one applies the factor: nobody does.",
)
def nobody_scales(*call: Any) -> Tensor:
    return run(*call, route=lambda *given: _rescaled(given, 1 / scale_of(given[2])))


@fault(
    "moe_block",
    "scaling",
    source=BUGS + "sgl-project/sglang/pull/12998",
    condition="routed_scaling_factor other than 1",
    shows={"family": "deepseek_v3"},
    hidden=("routed_scaling_factor=1.0", "family='qwen3_moe'"),
    consequence="The factor moved into one backend and stayed in its caller: it is applied twice.",
)
def scaled_by_backend_and_caller(*call: Any) -> Tensor:
    return run(*call, route=lambda *given: _rescaled(given, scale_of(given[2])))


def _rescaled(given: tuple[Tensor, Weights, Config], factor: float) -> Routing:
    topk_weights, topk_ids = route(*given)
    return topk_weights * factor, topk_ids


@fault(
    "moe_block",
    "scaling",
    source=BUGS + "kvcache-ai/sglang/pull/86",
    condition="routed_scaling_factor other than 1",
    shows={"family": "deepseek_v3"},
    hidden=("routed_scaling_factor=1.0", "family='qwen3_moe'"),
    consequence="Experts kept on one of two devices apply the factor themselves, and then it is applied to all.",
)
def half_of_the_experts_scaled_twice(*call: Any) -> Tensor:
    def hybrid(logits: Tensor, weights: Weights, config: Config) -> Routing:
        topk_weights, topk_ids = route(logits, weights, config)
        return topk_weights * torch.where(topk_ids % 2 == 0, scale_of(config), 1.0), topk_ids

    return run(*call, route=hybrid)


@fault(
    "moe_block",
    "scaling",
    source=BUGS + "vllm-project/vllm/pull/44313",
    condition="routed_scaling_factor other than 1 and a shared expert",
    shows={"family": "deepseek_v3"},
    hidden=("routed_scaling_factor=1.0", "family='qwen3_moe'"),
    consequence="The factor is applied after the shared expert was fused in, and scales it too.",
)
def scale_touches_shared_expert(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    factor = scale_of(config)
    return run(hidden_states, weights, config, merge=lambda routed, shared: routed + factor * shared)


# Shared expert --------------------------------------------------------------------------------------------------


@fault(
    "moe_block",
    "shared expert",
    source=BUGS + "NousResearch/torchtitan/pull/36",
    condition="a gated shared expert",
    shows={"family": "qwen2_moe"},
    hidden=("family='deepseek_v3'",),
    consequence="The shared expert's gate is lost in a refactoring.",
)
def shared_gate_lost(*call: Any) -> Tensor:
    return run(*call, shared=ungated)


@fault(
    "moe_block",
    "shared expert",
    source=BUGS + "vllm-project/vllm/pull/51632",
    condition="a shared expert",
    shows={"family": "qwen2_moe"},
    hidden=("family='qwen3_moe'",),
    consequence="The shared expert's appended id counts as invalid: its contribution is dropped.",
)
def shared_expert_dropped(*call: Any) -> Tensor:
    return run(*call, merge=lambda routed, shared: routed)


@fault(
    "moe_block",
    "shared expert",
    source=BUGS + "sgl-project/sglang/pull/35535",
    condition="a shared expert",
    shows={"family": "qwen2_moe"},
    hidden=("family='qwen3_moe'",),
    consequence="A replicated shared expert is summed by the reduction of two ranks: it counts twice.",
)
def replicated_shared_expert_summed(*call: Any) -> Tensor:
    return run(*call, merge=lambda routed, shared: routed + 2 * shared)


@fault(
    "moe_block",
    "shared expert",
    source=BUGS + "vllm-project/tpu-inference/pull/3435",
    condition="a shared expert",
    shows={"family": "deepseek_v2"},
    hidden=("family='qwen3_moe'",),
    consequence="One rank's partial sum of the shared expert is added to the reduced routed output.",
)
def shared_expert_left_partial(*call: Any) -> Tensor:
    def first_rank(x: Tensor, weights: Weights, config: Config) -> Tensor:
        names = [name for name in weights if name.startswith("shared_expert") and name.endswith("down_proj.weight")]
        halves = {name: weights[name].clone() for name in names}
        for half in halves.values():
            half[:, -(-half.shape[1] // 2) :] = 0
        return shared(x, {**weights, **halves}, config)

    return run(*call, shared=first_rank)


@fault(
    "moe_block",
    "shared expert",
    condition="a gated shared expert",
    shows={"family": "qwen2_moe"},
    hidden=("family='deepseek_v3'", "family='qwen3_moe'"),
    consequence="The gate multiplies the sum of routed and shared output instead of the shared output.",
)
def gate_on_the_whole_output(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    if "shared_expert_gate.weight" not in weights:
        return run(hidden_states, weights, config)
    kind = wide(hidden_states)
    gate = (hidden_states.to(kind) @ weights["shared_expert_gate.weight"].to(kind).T).sigmoid()
    return run(hidden_states, weights, config, merge=lambda routed, shared: gate * routed + shared)


@fault(
    "moe_block",
    "shared expert",
    source=BUGS + "sgl-project/sglang/pull/23827",
    condition="a shared expert",
    shows={"family": "qwen2_moe"},
    hidden=("family='qwen3_moe'",),
    consequence="The experts write over hidden_states before the shared expert has read it.",
)
def shared_expert_reads_routed_output(*call: Any) -> Tensor:
    seen: list[Tensor] = []

    def remember(*given: Any) -> Tensor:
        seen.append(routed(*given))
        return seen[0]

    return run(*call, routed=remember, shared=lambda x, weights, config: shared(seen[0], weights, config))


@fault(
    "moe_block",
    "loading",
    source=BUGS + "sgl-project/sglang/pull/38878",
    condition="a gated shared expert, its tensors after a fused one",
    shows={"family": "qwen2_moe"},
    hidden=("family='qwen3_moe'", "family='deepseek_v3'"),
    consequence="After a fused tensor the name mapping is not restored: a later up_proj is stored as gate_proj.",
)
def mapping_not_restored_after_fused(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    fused, loaded = False, dict(weights)
    for name in weights:
        fused = fused or name == "experts.gate_up_proj"
        if fused and name == "shared_expert.up_proj.weight":
            loaded["shared_expert.gate_proj.weight"] = weights[name]
    return run(hidden_states, loaded, config)


@fault(
    "moe_block",
    "reduction",
    source=BUGS + "vllm-project/vllm/pull/28277",
    condition="always",
    shows={},
    consequence="The output is complete already and is reduced over two ranks once more: it doubles.",
)
def reduced_once_more(*call: Any) -> Tensor:
    return run(*call, merge=lambda routed, shared: 2 * (routed + shared))


@fault(
    "moe_block",
    "residual",
    condition="always",
    shows={},
    consequence="The block adds its input, which the decoder layer does again.",
)
def input_added(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    return run(hidden_states, weights, config) + hidden_states


@fault(
    "moe_block",
    "inputs",
    source=BUGS + "vllm-project/vllm/pull/33375",
    condition="always",
    sign="inputs",
    shows={},
    consequence="The block writes its output over hidden_states.",
)
def block_output_over_input(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    return hidden_states.copy_(run(hidden_states, weights, config))


@fault(
    "moe_block",
    "inputs",
    condition="a shared expert",
    sign="inputs",
    shows={"family": "qwen2_moe"},
    hidden=("family='qwen3_moe'",),
    consequence="Weights are popped from the caller's dict: a second call has no shared expert.",
)
def weights_popped_from_dict(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    out = run(hidden_states, weights, config)
    for name in [name for name in weights if name.startswith("shared_expert")]:
        weights.pop(name)
    return out


@fault(
    "moe_block",
    "contract",
    condition="T = 0",
    sign="raises",
    shows={"T": 0},
    hidden=("T=1",),
    source=BUGS + "sgl-project/sglang/pull/25397",
    consequence="A block without tokens fails: an idle data-parallel rank takes the others with it.",
)
def block_raises_without_tokens(hidden_states: Tensor, weights: Weights, config: Config) -> Tensor:
    hidden_states.max()
    return run(hidden_states, weights, config)
