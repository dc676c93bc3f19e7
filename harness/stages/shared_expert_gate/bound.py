"""What a right result of the stage `shared_expert_gate` may be, from the error model of core/bounds."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import (
    ACCUMULATOR,
    Bound,
    Declared,
    Rounds,
    cut,
    drift_to,
    finish,
    in_tf32,
    permitted,
    product_variance,
    store,
)


def gate_variance(x: Tensor, weight: Tensor, rounds: Rounds, dtype: torch.dtype) -> Tensor:
    """Variance of sigmoid(x @ weight.T): the product's, a store of the logit, exp in fp32, a store of the gate."""
    logit = x @ weight.T
    gate = logit.sigmoid()
    slope = gate * (1 - gate)
    variance = slope.square() * (product_variance(x, weight, rounds, dtype) + store(logit, dtype))
    # exp(-logit) carries the rounding of its argument: |logit| roundoffs, which the slope keeps bounded
    return variance + (4 * ACCUMULATOR * gate * (1 + logit.abs() * (1 - gate))).square() + store(gate, dtype)


def gate_bound(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, *, declared: Declared) -> Bound:
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
