r"""The one home of bounds: unit roundoffs, ulps, and the variance of rounding errors carried through each stage.

A result is judged by z = (out - value) / sigma, elementwise: value in fp64, sigma^2 the variance that rounding at the
permitted places gives.  Rounding x to a dtype has variance ulp(x)^2 / 12; a sum of n products in an accumulator of unit
roundoff u has variance (1 + n/4) u^2 sum (w x)^2, which a sequential sum in random order stays under (its partial sums
grow as sqrt(n), so n/6 is what it needs).  A rounding that truncates (tf32 on tensor cores) has a mean besides, which
is carried through as a mean: `Bound.drift`.

Rounding errors are bounded and independent, hence strictly sub-Gaussian: P(|z| > t) <= 2 exp(-t^2 / 2).  Both limits
below follow from that and from the false alarms wanted, FALSE_ALARMS in a whole run; there is no other tolerance.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.contracts import ROUNDINGS
from moe_harness.reference import moe_block as block
from moe_harness.reference.experts import ExpertSteps, activate, expert_steps, local_ids, routed_rows
from moe_harness.reference.grouped_linear import row_experts
from moe_harness.reference.router import combine_weights, expert_scores

Rounds = frozenset[str]  # roundings that a result may hold
Declared = tuple[str, ...] | None  # those an implementation declares; None: all of them

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACCUMULATOR = 2.0**-24  # unit roundoff of fp32, the least the contract allows
TF32 = 2.0**-10  # distance between neighbours of tf32 at 1
TF32_DROPPED = 0x1FFF  # bits of an fp32 number that tf32 has not
FALSE_ALARMS = 1e-9
EXACT_FIT = 2.0**-20  # of the largest value: what a least-squares fit of exact data may leave
SAME_IN_FP64 = 2.0**-20  # sigmas between two orders of one sum in fp64; fp64 rounds 2^29 times finer than any sigma
ELEMENTS_PER_RUN = 1e8  # a quick run judges about 2e6 elements, a full one 5e7
MODEL = 1.05  # how far sigma itself is trusted; right implementations with every permitted rounding measure up to 1.01
STATISTICS_PER_RUN = 1e6  # rows, columns, experts and tiles


EXPONENT_BITS = 0x7FF0_0000_0000_0000  # of fp64


def binade(x: Tensor, dtype: torch.dtype) -> Tensor:
    """2^floor(log2 |x|) in fp64, never under the smallest normal number of `dtype`.

    Below that a device may flush to zero, so ulps do not shrink further.  Cutting the mantissa's bits off is exact and
    five times faster than frexp and ldexp, which took a third of the time of a bound.
    """
    floor = x.double().abs().clamp(min=torch.finfo(dtype).smallest_normal)
    return (floor.view(torch.int64) & EXPONENT_BITS).view(torch.float64)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at |x|, in fp64."""
    return binade(x, dtype).mul_(torch.finfo(dtype).eps)


def store(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of rounding x to `dtype`."""
    info = torch.finfo(dtype)
    variance = binade(x, dtype).square_().mul_(info.eps**2 / 12)
    if dtype != torch.float16:  # every device handles fp16's subnormals
        variance.add_(info.smallest_normal**2)  # flushed to zero instead of stored as a subnormal
    return variance


def rounded_once(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Largest error of x, rounded to `dtype` once: before it was multiplied by `scale`, or after."""
    info = torch.finfo(dtype)
    return (x.abs() + info.smallest_normal * max(1.0, scale)) * (info.eps / 2)


def accumulation(terms: int) -> float:
    """Variance factor of an fp32 sum of `terms` products, relative to the sum of their squares."""
    return (1 + terms / 4) * ACCUMULATOR**2


def in_tf32(rounds: Rounds, dtype: torch.dtype) -> bool:
    """Whether products of this dtype may read their operands as tf32."""
    return "tf32" in rounds and dtype == torch.float32


def cut(x: Tensor) -> Tensor:
    """fp64 values of the fp32 numbers `x`, cut toward zero to tf32, as Hopper's tensor cores read them."""
    return (x.float().view(torch.int32) & ~TF32_DROPPED).view(torch.float32).double()


def grid(x: Tensor) -> Tensor:
    """Variance of rounding x to tf32, to nearest: what a cut adds beside its drift."""
    return binade(x, torch.float32).square_().mul_(TF32**2 / 12)


def product_variance(rows: Tensor, weight: Tensor, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Variance of rows @ weight.T, [rows, N], for operands [rows, K] and [N, K] in fp64."""
    squares, of_weight = rows.square(), weight.square()
    variance = squares @ of_weight.T * accumulation(rows.shape[-1])
    if in_tf32(rounds, dtype):
        variance += grid(rows) @ of_weight.T + squares @ grid(weight).T
    return variance


def permitted(declared: Declared) -> Rounds:
    """The set of roundings a result may hold: what is declared, or all of them."""
    return frozenset(ROUNDINGS if declared is None else declared)


@dataclass(frozen=True)
class Bound:
    """What a result may be: fp64 value and variance, both of the output's shape.

    `shared` is the part of the variance whose sources scale a whole row alike (the rounding of a routing weight).
    `sources` [rows, 2] is how many independent sources the elements of a row have in common: of the rest (inf where
    each element has its own), and of the shared part.  Both bound the degrees of freedom of rms statistics.

    `drift` [2, *shape], lowest and highest: where between them the mean of a result lies is the implementation's
    choice, and no error.  Operands cut toward zero shrink every product; three products in a row move a result by
    their sum, since the shrinks have one sign, and that is up to ten of the sigmas which rounding them gives.
    """

    value: Tensor
    variance: Tensor
    shared: Tensor
    sources: Tensor
    drift: Tensor | None = None

    def error(self, output: Tensor) -> Tensor:
        """output - value in fp64, less what the drift allows; where both are infinite of one sign, 0."""
        error = output.double() - self.value
        error = torch.where(output.double() == self.value, torch.zeros_like(error), error)
        return error if self.drift is None else error - error.clamp(*self.drift)

    def z(self, output: Tensor) -> Tensor:
        """`error` in sigmas."""
        return self.error(output) / self.variance.sqrt()

    def flat(self) -> "Bound":
        """Leading dimensions flattened, a vector as one row."""
        width = self.value.shape[-1]
        value, variance, shared = (t.detach().reshape(-1, width) for t in (self.value, self.variance, self.shared))
        drift = None if self.drift is None else self.drift.reshape(2, -1, width)
        return Bound(value, variance, shared, self.sources, drift)

    def part(self, rows: Tensor) -> "Bound":
        """That of these rows (int64 row numbers), flat."""
        whole = self.flat()
        drift = None if whole.drift is None else whole.drift[:, rows]
        return Bound(whole.value[rows], whole.variance[rows], whole.shared[rows], whole.sources[rows], drift)

    def open_where(self, rows: Tensor) -> "Bound":
        """As it is, but without a limit in these rows [rows], bool.  Raises ValueError without a drift."""
        if self.drift is None:
            raise ValueError("only a bound with a drift can be opened")
        ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64, device=rows.device)
        return replace(self, drift=torch.where(rows[:, None], ends[:, None, None], self.drift))


def drift_to(value: Tensor, extreme: Tensor) -> Tensor:
    """Drift of a result whose mean lies between `value` and `extreme`; none where one of them is not finite."""
    moved = (extreme - value).nan_to_num(0.0, 0.0, 0.0)
    return torch.stack([moved.clamp(max=0), moved.clamp(min=0)])


def finish(value: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the store of the output: at the edge of a binade the result may fall on the side of the larger ulp."""
    return variance + store(value.abs() + variance.sqrt(), dtype)


@cache
def max_limit(elements: float = ELEMENTS_PER_RUN) -> float:
    """Limit of |z| for every element of a run."""
    return sqrt(2 * log(2 * elements / FALSE_ALARMS))


@cache
def _mean_square_quantile(dof: int) -> float:
    from scipy.special import chdtri

    return float(chdtri(dof, FALSE_ALARMS / STATISTICS_PER_RUN / 2)) / dof


def rms_limit(dof: float, shared_dof: float = 1, shared_share: float = 0.0) -> float:
    """Limit of an rms of z with `dof` independent sources, `shared_share` of its variance having only `shared_dof`."""
    own = (1 - shared_share) * _mean_square_quantile(_rounded_down(dof))
    return MODEL * sqrt(
        own + (shared_share * _mean_square_quantile(_rounded_down(shared_dof)) if shared_share > 0 else 0.0)
    )


def independent(sources: Tensor, width: int | Tensor) -> Tensor:
    """Degrees of freedom of the mean square of `width` elements whose errors are mixed from so many common sources.

    Two such elements correlate by about 1 / sqrt(sources) with a random sign, so the variance of their mean square is
    2 / width + 2 / sources.
    """
    return 1 / (1 / width + 1 / sources)


def sources_of(variance: Tensor, shared: Tensor, concentrated: Tensor) -> Tensor:
    """How many sources of equal size would concentrate the variance of a row [T, H] as its own do, float64 [T].

    concentrated [T] is the sum over the sources of the square of the variance that each adds to an element on average.
    Hidden values are of very unequal size: of 384 one may hold 40 % of the variance of a token's output.
    """
    found = (variance - shared).mean(-1).square() / concentrated
    return found.clamp(min=1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _count(rows: Tensor) -> Tensor:
    """How many values of equal size would be as concentrated as those of a row, [rows]; a cut of each is a source."""
    squares = rows.square()
    return (squares.sum(-1).square() / squares.square().sum(-1)).clamp(min=1).nan_to_num(nan=1.0)


def _rounded_down(dof: float) -> int:
    """A power of sqrt(2) below, so that few quantiles are computed; fewer degrees of freedom are the safe side."""
    exact = max(1, int(dof))
    return exact if exact < 8 else int(2 ** (int(2 * log(exact, 2)) / 2))


# ---------------------------------------------------------------------------------------------------------- stages


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


def experts(
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


def grouped_linear(x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None, declared: Declared) -> Bound:
    """Bound of the stage `grouped_linear`: one product per row, at most one more rounding before the bias."""
    rounds = permitted(declared)
    rows = x.double()
    value, variance, extreme = (
        torch.zeros(len(x), weight.shape[1], dtype=torch.float64, device=x.device) for _ in "123"
    )
    experts_of = row_experts(group_sizes)
    for expert in experts_of.unique().tolist():
        of_expert = (experts_of == expert).nonzero()[:, 0]
        w = weight[expert].double()
        value[of_expert] = rows[of_expert] @ w.T
        variance[of_expert] = product_variance(rows[of_expert], w, rounds, x.dtype)
        extreme[of_expert] = cut(rows[of_expert]) @ cut(w).T
    drift = drift_to(value, extreme) if in_tf32(rounds, x.dtype) else None
    if bias is not None:
        variance = variance + store(value, x.dtype)
        value = value + bias.double()[experts_of]
    variance = finish(value, variance, x.dtype)
    sources = torch.full((len(rows), 2), torch.inf, dtype=torch.float64, device=x.device)
    if drift is not None:
        sources[:, 0] = _count(rows)
    return Bound(value, variance, torch.zeros_like(variance), sources, drift)


def gate_variance(x: Tensor, weight: Tensor, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Variance of sigmoid(x @ weight.T): the product's, a store of the logit, exp in fp32, a store of the gate."""
    logit = x @ weight.T
    gate = logit.sigmoid()
    slope = gate * (1 - gate)
    variance = slope.square() * (product_variance(x, weight, rounds, dtype) + store(logit, dtype))
    # exp(-logit) carries the rounding of its argument: |logit| roundoffs, which the slope keeps bounded
    return variance + (4 * ACCUMULATOR * gate * (1 + logit.abs() * (1 - gate))).square() + store(gate, dtype)


def shared_expert_gate(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, *, declared: Declared
) -> Bound:
    """Bound of the stage `shared_expert_gate`; the gate's error is common to a row."""
    dtype, rounds = hidden_states.dtype, permitted(declared)
    x, w, y = hidden_states.double(), gate_weight.double(), shared_output.double()
    value = (x @ w.T).sigmoid() * y
    shared = y.square() * gate_variance(x, w, rounds, dtype)
    variance = finish(value, shared + store(value, torch.float32), dtype)
    sources = torch.ones(value.shape[:-1].numel(), 2, dtype=torch.float64, device=x.device)
    sources[:, 0] = torch.inf
    drift = drift_to(value, (cut(x) @ cut(w).T).sigmoid() * y) if in_tf32(rounds, dtype) else None
    return Bound(value, variance, shared, sources, drift)


def score_error(logits: Tensor, scoring: str) -> Tensor:
    """Largest error of an fp32 score relative to its value, [T, E]; a score under the smallest normal may be 0."""
    x = logits.double()
    if scoring == "softmax":
        largest = x.amax(-1, keepdim=True)
        distance = (x - largest).abs().nan_to_num(nan=0.0, posinf=0.0)  # exp(-inf) is 0 without error
        of_logsumexp = largest.abs().nan_to_num(nan=0.0, posinf=0.0)  # where the score is exp(x - logsumexp(x))
        return ACCUMULATOR * (6 + distance + of_logsumexp + sqrt(x.shape[-1]) * 2)
    return ACCUMULATOR * (6 + x.abs().nan_to_num(nan=0.0, posinf=0.0))


def score_slack(scores: Tensor, logits: Tensor, scoring: str) -> Tensor:
    """Largest error of an fp32 score in fp64, [T, E].

    A sigmoid as (1 + tanh(x / 2)) / 2, which shipped kernels use, is good to a roundoff of 1 and not of its own value.
    """
    slack = scores * score_error(logits, scoring)
    return slack + (2 * ACCUMULATOR if scoring == "sigmoid" else 0.0)


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


def moe_block(
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
    routed = experts(hidden_states, weights["experts.gate_up_proj"], weights["experts.down_proj"], topk_weights, ids,
                     activation=act, expert_map=None, declared=declared, weight_variance=2 * own,
                     cut_weights=cut_weights)  # fmt: skip
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
