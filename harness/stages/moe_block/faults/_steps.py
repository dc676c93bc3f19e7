"""A right implementation of the stage `moe_block` whose every step can be replaced; holds no fault itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import wide
from moe_harness.reference import moe_block as parts
from moe_harness.reference.experts import experts
from moe_harness.reference.router import router

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


class Steps(NamedTuple):
    """The steps that round: an implementation with other roundings has others."""

    routed: Callable[[Tensor, Weights, Routing, Config], Tensor] = routed
    shared: Callable[[Tensor, Weights, Config], Tensor] = shared
    part: Any = None  # of the part that is wrong, where the fault is one of a part: the `Steps` of its stage


RIGHT = Steps()


def run(
    hidden_states: Tensor,
    weights: Weights,
    config: Config,
    *,
    steps: Steps = RIGHT,
    logits: Callable[[Tensor, Weights, Config], Tensor] = parts.router_logits,
    route: Callable[[Tensor, Weights, Config], Routing] = route,
    routed: Callable[[Tensor, Weights, Routing, Config], Tensor] | None = None,
    shared: Callable[[Tensor, Weights, Config], Tensor] | None = None,
    merge: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Tensor:
    """A right implementation, in fp32 but for the logits; every keyword after `steps` replaces one of its steps."""
    parts.check_weights(weights, config)
    routing = route(logits(hidden_states, weights, config), weights, config)
    x = hidden_states.to(wide(hidden_states))
    routed, shared = routed or steps.routed, shared or steps.shared
    return merge(routed(x, weights, routing, config), shared(x, weights, config)).to(hidden_states.dtype)
