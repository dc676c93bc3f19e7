"""Faults of the whole block: flags read from the config, scaling, the shared expert and its gate."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import wide
from moe_harness.harness.stages.moe_block.faults._steps import (
    RIGHT,
    Config,
    Routing,
    Steps,
    Weights,
    route,
    route_with,
    run,
    scale_of,
    ungated,
)
from moe_harness.reference import moe_block as parts

# Routing as the config says -------------------------------------------------------------------------------------


@fault(
    "config", source="leonickson1/Swiftlet/pull/6", condition="qwen3_next without the key norm_topk_prob",
    shows={"family": "qwen3_next", "renorm": "default"}, hidden=("family=qwen3_moe", "renorm=yes"),
)  # fmt: skip
def absent_norm_topk_prob_is_false(*call: Any, **steps: Any) -> Tensor:
    """An absent norm_topk_prob is read as False where the family's default is True."""

    def without(logits: Tensor, weights: Weights, config: Config) -> Routing:
        if config["model_type"] == "qwen3_next" and "norm_topk_prob" not in config:
            return route_with(logits, weights, config, renormalize=False)
        return route(logits, weights, config)

    return run(*call, **steps, route=without)


@fault(
    "config", source="flashinfer-ai/flashinfer/pull/2889", condition="norm_topk_prob False, as in Qwen2-MoE",
    shows={"family": "qwen2_moe", "renorm": "no"}, hidden=("renorm=yes", "family=mixtral"),
)  # fmt: skip
def norm_topk_prob_hard_coded(*call: Any, **steps: Any) -> Tensor:
    """Renormalisation is hard-coded, as the most used model wants it."""

    def always(logits: Tensor, weights: Weights, config: Config) -> Routing:
        return route_with(logits, weights, config, renormalize=True)

    return run(*call, **steps, route=always)


@fault("config", condition="mixtral", shows={"family": "mixtral"}, hidden=("family=qwen3_moe",))
def mixtral_not_renormalised(*call: Any, **steps: Any) -> Tensor:
    """Mixtral's config has no norm_topk_prob, and the weights are not renormalised."""

    def without(logits: Tensor, weights: Weights, config: Config) -> Routing:
        if config["model_type"] == "mixtral":
            return route_with(logits, weights, config, renormalize=False)
        return route(logits, weights, config)

    return run(*call, **steps, route=without)


@fault(
    "config", source="JieShibo/MoLE/issues/7", condition="num_experts_per_tok above 2", shows={"k": 4}, hidden=("k=2",)
)
def two_experts_per_token(*call: Any, **steps: Any) -> Tensor:
    """The number of experts per token is a constant of 2."""

    def two(logits: Tensor, weights: Weights, config: Config) -> Routing:
        return route_with(logits, weights, config, top_k=min(2, parts.routing_rule(config).top_k))

    return run(*call, **steps, route=two)


@fault(
    "config", condition="deepseek_v3 with fewer groups kept than there are",
    shows={"family": "deepseek_v3", "E": 16}, hidden=("family=qwen3_moe",),
)  # fmt: skip
def config_groups_ignored(*call: Any, **steps: Any) -> Tensor:
    """n_group and topk_group are not read: experts come from all groups."""

    def anywhere(logits: Tensor, weights: Weights, config: Config) -> Routing:
        return route_with(logits, weights, config, num_expert_group=None, topk_group=None)

    return run(*call, **steps, route=anywhere)


@fault(
    "config", condition="deepseek_v3 with a correction bias", shows={"family": "deepseek_v3"},
    hidden=("family=qwen3_moe",),
)  # fmt: skip
def correction_bias_not_passed(*call: Any, **steps: Any) -> Tensor:
    """e_score_correction_bias is loaded and not passed to the router."""

    def unbiased(logits: Tensor, weights: Weights, config: Config) -> Routing:
        bias = parts.correction_bias(weights, config)
        if bias is None:
            return route(logits, weights, config)
        return route(logits, {**weights, "gate.e_score_correction_bias": torch.zeros_like(bias)}, config)

    return run(*call, **steps, route=unbiased)


@fault("weighting", condition="k > 1", hidden=("k=1",))
def block_flips_weights(*call: Any, **steps: Any) -> Tensor:
    """The block hands the router's weights on in ascending order of ids it did not sort."""

    def flipped(logits: Tensor, weights: Weights, config: Config) -> Routing:
        topk_weights, topk_ids = route(logits, weights, config)
        return topk_weights.flip(1), topk_ids

    return run(*call, **steps, route=flipped)


@fault("routing", source="GeeeekExplorer/nano-vllm/pull/116")
def gate_sees_half_of_h(*call: Any, **steps: Any) -> Tensor:
    """The router's gate is sharded like a row-parallel layer: logits are partial sums over half of H."""

    def partial(x: Tensor, weights: Weights, config: Config) -> Tensor:
        half = -(-x.shape[1] // 2)
        return parts.router_logits(x[:, :half], {"gate.weight": weights["gate.weight"][:, :half]}, config)

    return run(*call, **steps, logits=partial)


@fault("precision", condition="hidden states in fp32", hidden=("dtype=bf16", "dtype=fp16"))
def router_product_in_fp16(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """fp32 hidden states and gate are cast to fp16 for the router's product, as autocast does."""

    def narrow(x: Tensor, weights: Weights, config: Config) -> Tensor:
        if x.dtype != torch.float32:
            return parts.router_logits(x, weights, config)
        return x.half() @ weights["gate.weight"].half().T

    return run(hidden_states, weights, config, **steps, logits=narrow)


# Scaling --------------------------------------------------------------------------------------------------------


@fault(
    "scaling", source="sgl-project/sglang/pull/8511", condition="routed_scaling_factor other than 1",
    shows={"family": "deepseek_v3"}, hidden=("a routed_scaling_factor of 1", "family=qwen3_moe"),
)  # fmt: skip
def nobody_scales(*call: Any, **steps: Any) -> Tensor:
    """Router, experts and model each believe that another one applies the factor: nobody does."""
    return run(*call, **steps, route=lambda *given: _rescaled(given, 1 / scale_of(given[2])))


@fault(
    "scaling", source="sgl-project/sglang/pull/12998", condition="routed_scaling_factor other than 1",
    shows={"family": "deepseek_v3"}, hidden=("a routed_scaling_factor of 1", "family=qwen3_moe"),
)  # fmt: skip
def scaled_by_backend_and_caller(*call: Any, **steps: Any) -> Tensor:
    """The factor moved into one backend and stayed in its caller: it is applied twice."""
    return run(*call, **steps, route=lambda *given: _rescaled(given, scale_of(given[2])))


def _rescaled(given: tuple[Tensor, Weights, Config], factor: float) -> Routing:
    topk_weights, topk_ids = route(*given)
    return topk_weights * factor, topk_ids


@fault(
    "scaling", source="kvcache-ai/sglang/pull/86", condition="routed_scaling_factor other than 1",
    shows={"family": "deepseek_v3"}, hidden=("a routed_scaling_factor of 1", "family=qwen3_moe"),
)  # fmt: skip
def half_of_the_experts_scaled_twice(*call: Any, **steps: Any) -> Tensor:
    """Experts kept on one of two devices apply the factor themselves, and then it is applied to all."""

    def hybrid(logits: Tensor, weights: Weights, config: Config) -> Routing:
        topk_weights, topk_ids = route(logits, weights, config)
        return topk_weights * torch.where(topk_ids % 2 == 0, scale_of(config), 1.0), topk_ids

    return run(*call, **steps, route=hybrid)


@fault(
    "scaling", source="vllm-project/vllm/pull/44313",
    condition="routed_scaling_factor other than 1 and a shared expert", shows={"family": "deepseek_v3"},
    hidden=("a routed_scaling_factor of 1", "family=qwen3_moe"),
)  # fmt: skip
def scale_touches_shared_expert(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """The factor is applied after the shared expert was fused in, and scales it too."""
    factor = scale_of(config)
    return run(hidden_states, weights, config, **steps, merge=lambda routed, shared: routed + factor * shared)


# Shared expert --------------------------------------------------------------------------------------------------


@fault(
    "shared expert", source="NousResearch/torchtitan/pull/36", condition="a gated shared expert",
    shows={"family": "qwen2_moe"}, hidden=("family=deepseek_v3",),
)  # fmt: skip
def shared_gate_lost(*call: Any, **steps: Any) -> Tensor:
    """The shared expert's gate is lost in a refactoring."""
    return run(*call, **steps, shared=ungated)


@fault(
    "shared expert", source="vllm-project/vllm/pull/51632", condition="a shared expert", shows={"family": "qwen2_moe"},
    hidden=("family=qwen3_moe",),
)  # fmt: skip
def shared_expert_dropped(*call: Any, **steps: Any) -> Tensor:
    """The shared expert's appended id counts as invalid: its contribution is dropped."""
    return run(*call, **steps, merge=lambda routed, shared: routed)


@fault(
    "shared expert", source="sgl-project/sglang/pull/35535", condition="a shared expert",
    shows={"family": "qwen2_moe"}, hidden=("family=qwen3_moe",),
)  # fmt: skip
def replicated_shared_expert_summed(*call: Any, **steps: Any) -> Tensor:
    """A replicated shared expert is summed by the reduction of two ranks: it counts twice."""
    return run(*call, **steps, merge=lambda routed, shared: routed + 2 * shared)


@fault(
    "shared expert", source="vllm-project/tpu-inference/pull/3435", condition="a shared expert",
    shows={"family": "deepseek_v2"}, hidden=("family=qwen3_moe",),
)  # fmt: skip
def shared_expert_left_partial(*call: Any, steps: Steps = RIGHT) -> Tensor:
    """One rank's partial sum of the shared expert is added to the reduced routed output."""

    def first_rank(x: Tensor, weights: Weights, config: Config) -> Tensor:
        names = [name for name in weights if name.startswith("shared_expert") and name.endswith("down_proj.weight")]
        halves = {name: weights[name].clone() for name in names}
        for half in halves.values():
            half[:, -(-half.shape[1] // 2) :] = 0
        return steps.shared(x, {**weights, **halves}, config)

    return run(*call, steps=steps, shared=first_rank)


@fault(
    "shared expert", condition="a gated shared expert", shows={"family": "qwen2_moe"},
    hidden=("family=deepseek_v3", "family=qwen3_moe"),
)  # fmt: skip
def gate_on_the_whole_output(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """The gate multiplies the sum of routed and shared output instead of the shared output."""
    if "shared_expert_gate.weight" not in weights:
        return run(hidden_states, weights, config, **steps)
    kind = wide(hidden_states)
    gate = (hidden_states.to(kind) @ weights["shared_expert_gate.weight"].to(kind).T).sigmoid()
    return run(hidden_states, weights, config, **steps, merge=lambda routed, shared: gate * routed + shared)


@fault(
    "shared expert", source="sgl-project/sglang/pull/23827", condition="a shared expert",
    shows={"family": "qwen2_moe"}, hidden=("family=qwen3_moe",),
)  # fmt: skip
def shared_expert_reads_routed_output(*call: Any, steps: Steps = RIGHT) -> Tensor:
    """The experts write over hidden_states before the shared expert has read it."""
    seen: list[Tensor] = []

    def remember(*given: Any) -> Tensor:
        seen.append(steps.routed(*given))
        return seen[0]

    return run(
        *call, steps=steps, routed=remember, shared=lambda x, weights, config: steps.shared(seen[0], weights, config)
    )


@fault(
    "loading", source="sgl-project/sglang/pull/38878",
    condition="a gated shared expert, its tensors after a fused one", shows={"family": "qwen2_moe"},
    hidden=("family=qwen3_moe", "family=deepseek_v3"),
)  # fmt: skip
def mapping_not_restored_after_fused(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """After a fused tensor the name mapping is not restored: a later up_proj is stored as gate_proj."""
    fused, loaded = False, dict(weights)
    for name in weights:
        fused = fused or name == "experts.gate_up_proj"
        if fused and name == "shared_expert.up_proj.weight":
            loaded["shared_expert.gate_proj.weight"] = weights[name]
    return run(hidden_states, loaded, config, **steps)


@fault("reduction", source="vllm-project/vllm/pull/28277")
def reduced_once_more(*call: Any, **steps: Any) -> Tensor:
    """The output is complete already and is reduced over two ranks once more: it doubles."""
    return run(*call, **steps, merge=lambda routed, shared: 2 * (routed + shared))


@fault("residual")
def input_added(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """The block adds its input, which the decoder layer does again."""
    return run(hidden_states, weights, config, **steps) + hidden_states


@fault("inputs", source="vllm-project/vllm/pull/33375", sign="inputs")
def block_output_over_input(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """The block writes its output over hidden_states."""
    return hidden_states.copy_(run(hidden_states, weights, config, **steps))


@fault(
    "inputs", condition="a shared expert", shows={"family": "qwen2_moe"}, sign="inputs", hidden=("family=qwen3_moe",)
)
def weights_popped_from_dict(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """Weights are popped from the caller's dict: a second call has no shared expert."""
    out = run(hidden_states, weights, config, **steps)
    for name in [name for name in weights if name.startswith("shared_expert")]:
        weights.pop(name)
    return out


@fault(
    "contract", source="sgl-project/sglang/pull/25397", condition="T = 0", shows={"T": 0}, sign="raises",
    hidden=("T=1",),
)  # fmt: skip
def block_raises_without_tokens(hidden_states: Tensor, weights: Weights, config: Config, **steps: Any) -> Tensor:
    """A block without tokens fails: an idle data-parallel rank takes the others with it."""
    hidden_states.max()
    return run(hidden_states, weights, config, **steps)
