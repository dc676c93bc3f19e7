"""What a right result of the stage `moe_block` may be, from the error model of core/bounds."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import (
    Bound,
    Declared,
    Rounds,
    cut,
    drift_to,
    finish,
    in_tf32,
    permitted,
    product_variance,
    sources_of,
    store,
)
from moe_harness.harness.stages.experts.bound import cut_output, expert_steps_and_variance, experts_bound
from moe_harness.harness.stages.shared_expert_gate.bound import gate_variance
from moe_harness.reference import moe_block as block
from moe_harness.reference.router import combine_weights, expert_scores


def _routing_variance(
    logits: Tensor, of_logits: Tensor, ids: Tensor, weights: Tensor, rule: block.RoutingRule
) -> tuple[Tensor, Tensor]:
    """Variance of the routing weights' own errors [T, k], and of the relative error of what normalises them [T, 1].

    A softmax weight moves by w_j (d_j - sum_i w_i d_i) with the errors d of the logits; the sum runs over the chosen
    experts where they are renormalised, over all of them otherwise.
    """
    if rule.scoring == "sigmoid":
        of_logits = of_logits * (1 - logits.sigmoid()).square()
    chosen = of_logits.gather(-1, ids)
    own = weights.square() * chosen
    if rule.renormalize:
        share = weights / weights.sum(-1, keepdim=True)
        return own, (share.square() * chosen).sum(-1, keepdim=True)
    if rule.scoring == "sigmoid":
        return own, torch.zeros_like(own[:, :1])
    return own, (logits.softmax(-1).square() * of_logits).sum(-1, keepdim=True)


def block_bound(
    hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any], *, declared: Declared
) -> Bound:
    """Bound of the stage `moe_block`, for tokens whose choice of experts no permitted rounding changes."""
    dtype, rounds = hidden_states.dtype, permitted(declared)
    x, wide = (
        hidden_states.double(),
        {name: w.double() for name, w in weights.items() if not name.startswith("experts.")},
    )
    logits = block.router_logits(x, wide, config)
    of_logits = product_variance(x, wide["gate.weight"], rounds, dtype)
    of_logits = of_logits + store(logits, torch.float32 if block.family(config).router_in_fp32 else dtype)
    topk_weights, ids = block.routing(logits, wide, config)
    rule, act = block.routing_rule(config), block.activation(config)
    own, common = _routing_variance(logits, of_logits, ids, topk_weights, rule)
    cut_weights = _routing_weights(cut(x) @ cut(wide["gate.weight"]).T, ids, rule) if in_tf32(rounds, dtype) else None
    routed = experts_bound(
        hidden_states, weights["experts.gate_up_proj"], weights["experts.down_proj"], topk_weights, ids,
        activation=act, expert_map=None, declared=declared, weight_variance=2 * own,
        cut_weights=cut_weights,
    )  # fmt: skip
    of_norm = 2 * common * routed.value.square()
    value, variance, shared, drift = routed.value, routed.variance + of_norm, routed.shared + of_norm, routed.drift
    concentrated = (routed.variance - routed.shared).mean(-1).square() / routed.sources[:, 0]
    extra = _shared_expert(x, wide, act, rounds, dtype)
    if extra is not None:
        value, variance, shared = value + extra[0], variance + extra[1], shared + extra[2]
        variance, concentrated = finish(value, variance, dtype), concentrated + extra[3]
        drift = None if drift is None else drift + drift_to(extra[0], _cut_shared_expert(x, wide, act))
    sources = torch.stack([sources_of(variance, shared, concentrated), routed.sources[:, 1]], dim=-1)
    return Bound(value, variance, shared, sources, drift)


def _routing_weights(logits: Tensor, ids: Tensor, rule: block.RoutingRule) -> Tensor:
    """Weights [T, k] of the experts `ids`, whichever the logits would choose."""
    scores, scale = expert_scores(logits, rule.scoring), rule.routed_scaling_factor
    return combine_weights(scores, ids, renormalize=rule.renormalize, routed_scaling_factor=scale)


def _shared_prefix(weights: dict[str, Tensor]) -> str | None:
    return next((p for p in ("shared_expert", "shared_experts") if f"{p}.down_proj.weight" in weights), None)


def _cut_shared_expert(x: Tensor, wide: dict[str, Tensor], act: str) -> Tensor:
    """The shared expert's term where the operands of its products are cut to tf32."""
    prefix = _shared_prefix(wide)
    gate, up, down = (wide[f"{prefix}.{name}"] for name in block.SHARED_EXPERT)
    output = cut_output(x, torch.cat([gate, up]), down, act)
    if prefix == "shared_experts":
        return output
    return (cut(x) @ cut(wide["shared_expert_gate.weight"]).T).sigmoid() * output


def _shared_expert(
    x: Tensor, wide: dict[str, Tensor], act: str, rounds: Rounds, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(value, variance, the part of it common to a row, how the rest is concentrated) of the shared expert's term."""
    prefix = _shared_prefix(wide)
    if prefix is None:
        return None
    gate, up, down = (wide[f"{prefix}.{name}"] for name in block.SHARED_EXPERT)
    gate_up = torch.cat([gate, up])
    steps, variance, concentrated = expert_steps_and_variance(x, gate_up, down, act, rounds, dtype, weighted=False)
    variance = variance + store(steps.output, dtype)
    if prefix == "shared_experts":
        return steps.output, variance, torch.zeros_like(variance), concentrated
    weight = wide["shared_expert_gate.weight"]
    scale = (x @ weight.T).sigmoid()
    value = scale * steps.output
    common = steps.output.square() * gate_variance(x, weight, rounds, dtype)
    variance = scale.square() * variance + common + store(value, dtype)
    return value, variance, common, scale[:, 0] ** 4 * concentrated
