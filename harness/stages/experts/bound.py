"""What a right result of the stage `experts` may be, from the error model of core/bounds."""

from math import sqrt

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import (
    ACCUMULATOR,
    Bound,
    Declared,
    Rounds,
    _count,
    cut,
    drift_to,
    finish,
    in_tf32,
    independent,
    permitted,
    product_variance,
    sources_of,
    store,
)
from moe_harness.reference.experts import ExpertSteps, activate, expert_steps, local_ids, routed_rows


def activation_derivative(gate: Tensor, activation: str) -> Tensor:
    """d act / d gate, elementwise."""
    if activation == "silu":
        s = gate.sigmoid()
        return s * (1 + gate * (1 - s))
    root, cubic = sqrt(2 / torch.pi), 0.044715
    t = torch.tanh(root * (gate + cubic * gate**3))
    return 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * root * (1 + 3 * cubic * gate * gate)


def _hidden_variance(
    steps: ExpertSteps, variance: Tensor, activation: str, rounds: Rounds, dtype: torch.dtype
) -> Tensor:
    """Variance of act(g) * u, given that of [g; u]."""
    if "gate_up" in rounds:
        variance = variance + store(torch.cat([steps.gate, steps.up], dim=-1), dtype)
    of_gate, of_up = variance.chunk(2, dim=-1)
    # exp, tanh and the division in fp32: a few roundoffs of |g|, since silu and its argument's error are at most that
    of_act = activation_derivative(steps.gate, activation).square() * of_gate + (4 * ACCUMULATOR * steps.gate).square()
    if "activation" in rounds:
        of_act = of_act + store(steps.activated, dtype)
    hidden = steps.up.square() * of_act + steps.activated.square() * of_up
    return hidden + (store(steps.hidden, dtype) if "activation" in rounds else store(steps.hidden, torch.float32))


def expert_steps_and_variance(
    rows: Tensor, gate_up: Tensor, down: Tensor, activation: str, rounds: Rounds, dtype: torch.dtype, *, weighted: bool
) -> tuple[ExpertSteps, Tensor, Tensor]:
    """(steps of one expert on `rows`, variance of its output [n, H], how it is concentrated [n]: see `_sources`).

    `weighted`: the routing weight may be applied to the hidden values instead, which rounds them a second time.
    """
    gate_up, down = gate_up.double(), down.double()
    steps = expert_steps(rows, gate_up, down, activation)
    hidden = _hidden_variance(steps, product_variance(rows, gate_up, rounds, dtype), activation, rounds, dtype)
    if weighted and "weighted" in rounds:
        hidden += store(steps.hidden, dtype)
    squares = down.square()
    concentrated = (hidden * squares.mean(0)).square().sum(-1)
    variance = hidden @ squares.T + product_variance(steps.hidden, down, rounds, dtype)
    if "expert_output" in rounds:
        variance += store(steps.output, dtype)
    return steps, variance, concentrated


def cut_output(rows: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """An expert's output [n, H] where the operands of both products are cut to tf32."""
    gate, up = (cut(rows) @ cut(gate_up).T).chunk(2, dim=-1)
    return cut(activate(gate, activation) * up) @ cut(down).T


def experts_bound(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor, *,
    activation: str, expert_map: Tensor | None, declared: Declared, weight_variance: Tensor | None = None,
    cut_weights: Tensor | None = None,
) -> Bound:  # fmt: skip
    """Bound of the stage `experts`.  `weight_variance` [T, k] is that of routing weights which are themselves computed,
    `cut_weights` [T, k] what they are where the operands of the router's product are cut to tf32.

    A duplicate of an expert in a row shares its error with the first, so a token's slots on one expert are taken
    together, with the sum of their weights.
    """
    dtype, rounds = hidden_states.dtype, permitted(declared)
    x, weights = hidden_states.double(), topk_weights.double()
    value, variance, shared, squares, extreme = (torch.zeros_like(x, dtype=torch.float64) for _ in range(5))
    ids = local_ids(topk_ids, expert_map)
    slots_of, concentrated = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2))
    inexact_weights = "routing_weight" in rounds and topk_weights.dtype != dtype
    for expert, tokens, slots in routed_rows(ids):
        unique, inverse = tokens.unique(return_inverse=True)
        weight = x.new_zeros(len(unique), 1).index_add_(0, inverse, weights[tokens, slots, None])
        copies = x.new_zeros(len(unique), 1).index_add_(0, inverse, torch.ones_like(weights[tokens, slots, None]))
        steps, of_output, peaks = expert_steps_and_variance(
            x[unique], gate_up_proj[expert], down_proj[expert], activation, rounds, dtype, weighted=True
        )
        weighted = weight * steps.output
        of_row = weight.square() * of_output
        of_row = of_row + copies * store(weighted, dtype if "weighted" in rounds else torch.float32)
        if inexact_weights:
            shared.index_add_(0, unique, copies * store(weight, dtype) * steps.output.square())
        if weight_variance is not None:
            of_weight = x.new_zeros(len(unique), 1).index_add_(0, inverse, weight_variance[tokens, slots, None].sqrt())
            shared.index_add_(0, unique, of_weight.square() * steps.output.square())
        value.index_add_(0, unique, weighted)
        if in_tf32(rounds, dtype):
            if cut_weights is not None:
                weight = x.new_zeros(len(unique), 1).index_add_(0, inverse, cut_weights[tokens, slots, None])
            of_cut = cut_output(x[unique], gate_up_proj[expert], down_proj[expert], activation)
            extreme.index_add_(0, unique, weight * of_cut)
        variance.index_add_(0, unique, of_row)
        squares.index_add_(0, unique, weighted.square())
        slots_of.index_add_(0, unique, copies[:, 0])
        concentrated.index_add_(0, unique, weight[:, 0] ** 4 * peaks)
    partial = torch.maximum(value.abs(), squares.sqrt())
    sums = (slots_of - 1).clamp(min=0)[:, None] * store(partial, dtype if "partial_sum" in rounds else torch.float32)
    variance = finish(value, variance + sums + shared, dtype)
    own, drift = sources_of(variance, shared, concentrated), None
    if in_tf32(rounds, dtype):
        own, drift = independent(own, _count(x)), drift_to(value, extreme)
    return Bound(value, variance, shared, torch.stack([own, slots_of.clamp(min=1)], dim=-1), drift)
