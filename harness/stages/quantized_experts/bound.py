r"""Bound of the stage `quantized_experts`, of the pieces of `core.bounds`.

Codes and scales are exact, and so are the weights W that they stand for.  Beside the roundings of the stage `experts`:

- `weight`: W may be rounded to the dtype of hidden_states; what that changes is known, its effect on a sum is random.
- codes of `int4_group` may be summed as they are stored, with 8 sum x taken from each group behind: the terms of such a
  sum are larger, (w^2 + (8 s)^2) x^2 on average.  In fp32 that is 2.8 times the error, beside 16-bit roundings nothing.
- biases may be added before or behind the store that `gate_up` or `expert_output` permits.
- activations, where an implementation declares `quantizes`: each row that enters a product becomes codes times s, with
  s = max |x| / largest code, or that rounded up to a power of two.  A code's error is uniform over its spacing; between
  the two scales the coarser spacing counts.

The error d of row x reaches gate and up together: with the slopes A = dh/dg and B = dh/du, hidden value i moves by
sum over k of d_k (A_i Wg[i, k] + B_i Wu[i, k]), so the variance has the product of both.  fp8 products of Hopper's
tensor cores keep about 14 bits between promotions; that adds less than a tenth to the codes' variance up to K = 8192.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.bounds import ACCUMULATOR, Bound, Declared, Rounds, accumulation, store
from moe_harness.harness.stages.experts.bound import activation_derivative
from moe_harness.harness.stages.quantized_experts.contract import ROUNDINGS
from moe_harness.reference.experts import activate, local_ids, routed_rows
from moe_harness.reference.quantized_experts import (
    ALPHA,
    BLOCK,
    LIMIT,
    QuantizedSteps,
    dequantised,
    quantized_steps,
)

CODES = {"fp8_token": (448.0, None), "fp8_group128": (448.0, 128), "int8_token": (127.0, None)}
E4M3 = torch.float8_e4m3fn
ZERO_POINT = 8.0  # of int4_group


class Expert(NamedTuple):
    """One expert's dequantised matrices and biases in fp64."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_zero: Tensor | float = 0.0  # square of what the zero point of a stored code adds to its value
    down_zero: Tensor | float = 0.0


def code_variance(rows: Tensor, quantizes: str | None, before: Tensor | None = None) -> Tensor:
    """Variance of what becomes of rows [n, K] in fp64 where they are quantised as declared, elementwise.

    `before` is the variance that the rows come with: an error may lift the largest of them over a power of two, and all
    codes then are half as fine.
    """
    if quantizes is None:
        return torch.zeros_like(rows)
    largest, width = CODES[quantizes]
    columns = rows.shape[-1]
    across = width or max(1, columns)
    sizes = rows.abs()
    reach = sizes if before is None else sizes + bounds.max_limit() * before.sqrt()
    groups, reached = (
        torch.nn.functional.pad(part, (0, -columns % across)).unflatten(-1, (-1, across)) for part in (sizes, reach)
    )
    scale, most = (part.amax(-1, keepdim=True) / largest for part in (groups, reached))
    found = torch.zeros_like(groups)
    for s in (scale, most.log2().ceil().exp2()):
        safe = torch.where(s > 0, s, 1.0)
        spacing = torch.ones_like(groups) if largest == CODES["int8_token"][0] else _spacing(groups / safe)
        found = torch.maximum(found, (spacing * s).square() / 12)
    return found.flatten(-2)[..., :columns]


def _spacing(codes: Tensor) -> Tensor:
    """Distance between neighbours of e4m3 at `codes`; under 2^-6 they are evenly spaced."""
    info = torch.finfo(E4M3)
    return bounds.binade(codes.clamp(min=info.smallest_normal), torch.float32) * info.eps


def weight_variance(weights: Tensor, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Square of what rounding weights to `dtype` changes, where that is permitted.

    It is known, and not uniform over an ulp: a code of four bits times a scale of eight has many ties.
    """
    if "weight" not in rounds:
        return torch.zeros_like(weights)
    return (weights.to(dtype).double() - weights).square().nan_to_num(nan=0.0)


def slopes(steps: QuantizedSteps, activation: str, spread: Tensor) -> tuple[Tensor, Tensor]:
    """(dh/dg, dh/du), each the larger one where an error of `spread` sigmas may cross a clamp."""
    gate, up = steps.gate, steps.up
    if activation != "swiglu_oai":
        return activation_derivative(gate, activation) * up, activate(gate, activation)
    of_gate, of_up = (spread.sqrt() * bounds.max_limit()).chunk(2, dim=-1)
    g, u = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    s = (ALPHA * g).sigmoid()
    by_gate = (u + 1) * s * (1 + ALPHA * g * (1 - s))
    return by_gate.where(gate < LIMIT + of_gate, 0.0), (g * s).where(up.abs() < LIMIT + of_up, 0.0)


def steps_and_variance(
    rows: Tensor, expert: Expert, activation: str, rounds: Rounds, dtype: torch.dtype, quantizes: str | None
) -> tuple[QuantizedSteps, Tensor, Tensor]:
    """(steps of one expert on `rows` in fp64, variance of its output [n, H], how it is concentrated [n])."""
    steps = quantized_steps(rows, expert.gate_up, expert.down, activation, expert.gate_up_bias, expert.down_bias)
    first = torch.cat([steps.gate, steps.up], dim=-1)
    squares = expert.gate_up.square()
    of_first = (
        rows.square()
        @ (
            (squares + expert.gate_up_zero) * accumulation(rows.shape[-1])
            + weight_variance(expert.gate_up, rounds, dtype)
        ).T
    )
    of_first = of_first + _stored(first, expert.gate_up_bias, dtype if "gate_up" in rounds else torch.float32)
    of_codes = None if quantizes is None else code_variance(rows, quantizes)
    a, b = slopes(steps, activation, of_first if of_codes is None else of_first + of_codes @ squares.T)
    of_gate, of_up = of_first.chunk(2, dim=-1)
    hidden = a.square() * of_gate + b.square() * of_up + _of_glu(steps, activation, rounds, dtype)
    from_codes = torch.zeros_like(hidden) if of_codes is None else _from_codes(of_codes, expert, a, b)
    if "weighted" in rounds:
        hidden = hidden + store(steps.hidden, dtype)
    hidden = hidden + code_variance(steps.hidden, quantizes, hidden + from_codes)
    down = expert.down.square()
    across = down.mean(0)
    # The error of a hidden value is common to a whole row, whatever number of codes it comes from.
    peaks = ((hidden + from_codes) * across).square().sum(-1)
    if of_codes is not None:
        peaks = peaks + _peaks_of_codes(from_codes @ across, of_codes, squares)
    variance = (hidden + from_codes) @ down.T
    variance = (
        variance
        + steps.hidden.square()
        @ ((down + expert.down_zero) * accumulation(down.shape[-1]) + weight_variance(expert.down, rounds, dtype)).T
    )
    return (
        steps,
        variance + _stored(steps.output, expert.down_bias, dtype if "expert_output" in rounds else torch.float32),
        peaks,
    )


def _zero(scale: Tensor | None, format: str) -> Tensor | float:
    """(8 s)^2 of each element of a matrix of `int4_group`; 0 of formats without a zero point."""
    if scale is None or format != "int4_group":
        return 0.0
    return (ZERO_POINT * scale.double()).square().repeat_interleave(BLOCK, -1)


def _from_codes(of_codes: Tensor, expert: Expert, a: Tensor, b: Tensor) -> Tensor:
    """Variance of hidden values from that of codes, which reaches gate and up together."""
    gate_rows, up_rows = expert.gate_up.chunk(2)
    return (
        a.square() * (of_codes @ gate_rows.square().T)
        + b.square() * (of_codes @ up_rows.square().T)
        + 2 * a * b * (of_codes @ (gate_rows * up_rows).T)
    ).clamp(min=0)


def _stored(value: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Variance of storing a product, and again behind its bias."""
    variance = store(value, dtype)
    return variance if bias is None else variance + store(value - bias, dtype)


def _of_glu(steps: QuantizedSteps, activation: str, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Variance that the activation itself adds: its arithmetic in fp32, its stores."""
    to = dtype if "activation" in rounds else torch.float32
    gate, up = steps.gate, steps.up
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT) + 1
        act, of_up = gate * (ALPHA * gate).sigmoid(), store(up, to)
    else:
        act, of_up = activate(gate, activation), torch.zeros_like(up)
    # exp and the division in fp32: a few roundoffs of |g|
    of_act = store(act, to) + (4 * ACCUMULATOR * gate).square()
    return up.square() * of_act + act.square() * of_up + store(steps.hidden, to)


def _peaks_of_codes(mean: Tensor, of_codes: Tensor, squares: Tensor) -> Tensor:
    """`mean` [n], the variance that the codes of a row add to an element on average, as their number divides it."""
    shares = of_codes * squares.mean(0)
    total = shares.sum(-1)
    return mean.square() * (shares.square().sum(-1) / total.square()).nan_to_num(nan=0.0)


def quantized_experts(
    hidden_states: Tensor, gate_up_proj: Tensor, gate_up_scale: Tensor | None, down_proj: Tensor,
    down_scale: Tensor | None, topk_weights: Tensor, topk_ids: Tensor, *, format: str, activation: str,
    expert_map: Tensor | None, gate_up_bias: Tensor | None, down_bias: Tensor | None, declared: Declared,
    quantizes: str | None,
) -> Bound:  # fmt: skip
    """Bound of a result; slots of a token on one expert are taken together, with the sum of their weights."""
    dtype = hidden_states.dtype
    rounds = frozenset(ROUNDINGS if declared is None else declared)
    x, weights = hidden_states.double(), topk_weights.double()
    value, variance, shared, squares = (torch.zeros_like(x) for _ in range(4))
    slots_of, concentrated = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2))
    for expert, tokens, slots in routed_rows(local_ids(topk_ids, expert_map)):
        unique, inverse = tokens.unique(return_inverse=True)
        weight = x.new_zeros(len(unique), 1).index_add_(0, inverse, weights[tokens, slots, None])
        copies = x.new_zeros(len(unique), 1).index_add_(0, inverse, torch.ones_like(weights[tokens, slots, None]))
        scales = [None if scale is None else scale[expert] for scale in (gate_up_scale, down_scale)]
        matrices = [dequantised(c[expert], s, format) for c, s in zip((gate_up_proj, down_proj), scales, strict=True)]
        biases = (None if bias is None else bias[expert].double() for bias in (gate_up_bias, down_bias))
        layer = Expert(*matrices, *biases, *(_zero(scale, format) for scale in scales))
        steps, of_output, peaks = steps_and_variance(x[unique], layer, activation, rounds, dtype, quantizes)
        weighted = weight * steps.output
        of_row = weight.square() * of_output + copies * store(
            weighted, dtype if "weighted" in rounds else torch.float32
        )
        if "routing_weight" in rounds and topk_weights.dtype != dtype:
            shared.index_add_(0, unique, copies * store(weight, dtype) * steps.output.square())
        value.index_add_(0, unique, weighted)
        variance.index_add_(0, unique, of_row)
        squares.index_add_(0, unique, weighted.square())
        slots_of.index_add_(0, unique, copies[:, 0])
        concentrated.index_add_(0, unique, weight[:, 0] ** 4 * peaks)
    partial = torch.maximum(value.abs(), squares.sqrt())
    sums = (slots_of - 1).clamp(min=0)[:, None] * store(partial, dtype if "partial_sum" in rounds else torch.float32)
    variance = bounds.finish(value, variance + sums + shared, dtype)
    own = bounds.sources_of(variance, shared, concentrated)
    return Bound(value, variance, shared, torch.stack([own, slots_of.clamp(min=1)], dim=-1))
