"""What a right result of the stage `grouped_linear` may be, from the error model of core/bounds."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import (
    Bound,
    Declared,
    _count,
    cut,
    drift_to,
    finish,
    in_tf32,
    permitted,
    product_variance,
    store,
)
from moe_harness.reference.grouped_linear import row_experts


def grouped_linear_bound(
    x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None, declared: Declared
) -> Bound:
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
