r"""Largest possible error of a block that is computed step by step, elementwise, to first order in the unit roundoffs.

With u the roundoff of the stored dtype and v that of the accumulator, every step adds what it rounds and carries on
what it was given:

    product of length n     n v |A||B|        (whatever the order of summation)
    store                   u |value|
    act(g)                  1.13 dg           (the largest slope of silu is 1.10, of gelu_tanh 1.13)
    softmax, sigmoid        relative error 2 max |dl|, or |dl|, and some roundoffs of fp32, in which scores are computed

This is far wider than a statistical bound, but it needs no assumption.  In fp64 only the scores matter, which
transformers computes in fp32 whatever it is given: the bound is then some 1e-6 of the output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_harness.reference import moe_block as reference
from moe_harness.reference.experts import activate
from moe_harness.reference.router import expert_scores, group_scores, selection_scores

FP32 = 2.0**-24  # unit roundoff
STEEPEST = 1.13
FUNCTION_ROUNDOFFS = 8  # exp, division and the like, evaluated in the accumulator's precision


@dataclass(frozen=True)
class Roundoffs:
    """Unit roundoffs of the stored dtype and of the accumulator."""

    stored: float
    accumulator: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Roundoffs":
        stored = torch.finfo(dtype).eps / 2
        return cls(stored, min(stored, FP32))


@dataclass(frozen=True)
class WorstCase:
    """`bound` [T, H] holds for the tokens in `certain` [T]: the others may rightly be routed to other experts."""

    bound: Tensor
    certain: Tensor


def worst_case(hidden_states: Tensor, weights: dict[str, Tensor], config: dict, dtype: torch.dtype) -> WorstCase:
    """The bound for a block computed in `dtype`, from fp64 operands: hidden_states [T, H] and the block's weights."""
    rounds = Roundoffs.of(dtype)
    logits, of_logits = _logits(hidden_states, weights, config, rounds)
    relative = _relative_score_error(logits, of_logits, config)
    certain = _certain(logits, of_logits, weights, config)
    value, error = _experts(hidden_states, weights, config, logits, relative, rounds)
    shared = _shared(hidden_states, weights, config, rounds)
    if shared is not None:
        value, error = value + shared[0], error + shared[1]
    first_order = error + rounds.stored * value.abs()
    return WorstCase(first_order * (1 + 32 * rounds.stored), certain)  # what is beyond first order


def _logits(x: Tensor, weights: dict[str, Tensor], config: dict, rounds: Roundoffs) -> tuple[Tensor, Tensor]:
    gate = weights["gate.weight"]
    value, size = x @ gate.T, x.abs() @ gate.abs().T
    if reference.family(config).router_in_fp32:
        return value, (x.shape[1] + 2) * FP32 * size
    return value, x.shape[1] * rounds.accumulator * size + (rounds.stored + FP32) * value.abs()


def _relative_score_error(logits: Tensor, of_logits: Tensor, config: dict) -> Tensor:
    """Error of a score relative to the score, [T, E]."""
    if reference.family(config).scoring == "sigmoid":
        return of_logits + FUNCTION_ROUNDOFFS * FP32
    span = logits.amax(1, keepdim=True) - logits
    return 2 * of_logits.amax(1, keepdim=True) + FP32 * (logits.shape[1] + FUNCTION_ROUNDOFFS + span)


def _certain(logits: Tensor, of_logits: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    """Tokens whose choice no rounding can change: at every cut all that is chosen stays above all that is left."""
    rule = reference.routing_rule(config)
    low, high = _selection(logits, of_logits, reference.correction_bias(weights, config), rule.scoring)
    certain = torch.ones(len(logits), dtype=torch.bool)
    if rule.num_expert_group is not None:
        biased = reference.correction_bias(weights, config) is not None
        group_low, group_high = (group_scores(bound, rule.num_expert_group, biased=biased) for bound in (low, high))
        clear, kept = _clear_cut(group_low, group_high, rule.topk_group)
        certain &= clear
        outside = ~kept.repeat_interleave(low.shape[1] // rule.num_expert_group, dim=1)
        low, high = low.masked_fill(outside, -torch.inf), high.masked_fill(outside, -torch.inf)
    return certain & _clear_cut(low, high, rule.top_k)[0]


def _selection(logits: Tensor, of_logits: Tensor, bias: Tensor | None, scoring: str) -> tuple[Tensor, Tensor]:
    """Least and largest value the choice may be made on.  Softmax keeps the order of the logits, so those are used."""
    if scoring == "softmax":
        span = logits.amax(1, keepdim=True) - logits
        error = of_logits + FP32 * (FUNCTION_ROUNDOFFS + span)
        return logits - error, logits + error
    scores = expert_scores(logits, scoring)
    selection = selection_scores(scores, bias)
    error = scores * (of_logits + FUNCTION_ROUNDOFFS * FP32) + FP32 * selection.abs()
    return selection - error, selection + error


def _clear_cut(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows whose `count` best are above the others wherever the true values lie, [T], and the best, [T, n]."""
    chosen = torch.zeros_like(low, dtype=torch.bool).scatter(1, (low + high).topk(count).indices, True)
    worst_chosen = low.masked_fill(~chosen, torch.inf).amin(1)
    best_left = high.masked_fill(chosen, -torch.inf).amax(1)
    return worst_chosen > best_left, chosen


def _experts(x, weights, config, logits, relative, rounds: Roundoffs) -> tuple[Tensor, Tensor]:
    kind, rule = reference.family(config), reference.routing_rule(config)
    topk_weights, ids = reference.routing(logits, weights, config)
    of_weights = relative.gather(1, ids)
    if rule.renormalize:  # the sum's relative error is at most the largest of its terms
        of_weights = of_weights + of_weights.amax(1, keepdim=True) + (rule.top_k + 1) * FP32
    of_weights = of_weights + FP32 + (0.0 if kind.weights_in_fp32 else rounds.stored)
    value, error, size = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    act = reference.activation(config)
    for expert in ids.unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        gate, up = weights["experts.gate_up_proj"][expert].chunk(2)
        output, of_output = _mlp(x[tokens], gate, up, weights["experts.down_proj"][expert], act, rounds)
        weight = topk_weights[tokens, slots, None]
        weighted = weight * output
        value.index_add_(0, tokens, weighted)
        size.index_add_(0, tokens, weighted.abs())
        of_weight = of_weights[tokens, slots, None] * weight.abs()
        error.index_add_(0, tokens, weight.abs() * of_output + of_weight * (output.abs() + of_output))
    # The product with the weight, and a running sum over the slots in the stored dtype.
    return value, error + (rule.top_k + 1) * rounds.stored * size


def _mlp(x, gate, up, down, act: str, rounds: Roundoffs) -> tuple[Tensor, Tensor]:
    """down @ (act(gate @ x) * (up @ x)) and its error, both [n, H]."""
    (g, of_g), (u, of_u) = _linear(x, 0.0, gate, rounds), _linear(x, 0.0, up, rounds)
    a = activate(g, act)
    of_a = STEEPEST * of_g + FUNCTION_ROUNDOFFS * rounds.accumulator * (g.abs() + a.abs()) + rounds.stored * a.abs()
    h = a * u
    of_h = u.abs() * of_a + a.abs() * of_u + of_a * of_u + rounds.stored * h.abs()
    return _linear(h, of_h, down, rounds)


def _linear(x: Tensor, of_x: Tensor | float, weight: Tensor, rounds: Roundoffs) -> tuple[Tensor, Tensor]:
    value = x @ weight.T
    error = (x.abs() * x.shape[1] * rounds.accumulator + of_x) @ weight.abs().T
    return value, error + rounds.stored * value.abs()


def _shared(x, weights, config, rounds: Roundoffs) -> tuple[Tensor, Tensor] | None:
    prefix = next((p for p in ("shared_expert", "shared_experts") if f"{p}.down_proj.weight" in weights), None)
    if prefix is None:
        return None
    parts = (weights[f"{prefix}.{name}"] for name in reference.SHARED_EXPERT)
    value, error = _mlp(x, *parts, reference.activation(config), rounds)
    if prefix == "shared_experts":
        return value, error
    logit, of_logit = _linear(x, 0.0, weights["shared_expert_gate.weight"], rounds)
    gate = logit.sigmoid()
    of_gate = of_logit / 4 + (FUNCTION_ROUNDOFFS * rounds.accumulator + rounds.stored) * gate
    return gate * value, gate * error + of_gate * (value.abs() + error) + rounds.stored * (gate * value).abs()
