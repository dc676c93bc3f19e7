"""How an implementation of the stage `grouped_linear` sums."""

import torch
from torch import Tensor

from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.probing import TERMS, Sum, first_column, split_terms
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase


def products(trial: Trial, dtype: str) -> dict[str, Sum]:
    """The sums of the product."""
    return {"the product": lambda rows: _linear_sums(trial, dtype, rows)}


def _linear_sums(trial: Trial, dtype: str, rows: Tensor) -> Tensor | None:
    x, weight = split_terms(rows)
    case = GroupedLinearCase(S=len(x), K=TERMS, N=16, E=1, dtype=dtype, optional=True)
    args = {"x": x, "weight": torch.zeros(1, 16, TERMS), "group_sizes": torch.tensor([len(x)])}
    args["weight"][0, 0] = weight
    return first_column(trial, case, args, {"bias": None})
