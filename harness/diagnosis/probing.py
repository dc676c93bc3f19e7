"""What the probes of the stages are built from: sums of known terms, and a call that gives one column."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.invocation import Broken, Rejected, Trial

BITS = {"fp32": 24, "fp16": 11, "bf16": 8}
TERMS = 256  # length of the sums that are probed
FIRST = 6
SCALE = 12  # L is 2^j = 2^(j - SCALE) * 2^SCALE, so that both factors fit fp16
GATE = 32.0  # silu and gelu_tanh of it are 32 in every dtype

Sum = Callable[[Tensor], Tensor | None]  # [rows, TERMS] of factors -> the sums of a row


def split_terms(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of each term: [rows, TERMS] for the activations, and [TERMS] for the weights, common to all rows."""
    weight = torch.ones(TERMS)
    large = rows.abs().amax(0) >= 2.0**FIRST
    weight[large] = 2.0**SCALE
    return rows / weight, weight


def first_column(trial: Trial, case: Case, args: dict[str, Tensor], keywords: dict[str, Any]) -> Tensor | None:
    """Column 0 of the result, in fp64 on the CPU; None where the implementation refuses or fails."""
    call = Call(case, {}, keywords)
    for name, values in args.items():
        kind = DTYPES[case.dtype] if values.is_floating_point() and name != "topk_weights" else values.dtype
        call.args[name] = call.arena.place(name, values.to(trial.device, kind))
    try:
        return trial.invoke(call)[:, 0].double().cpu()
    except (Rejected, Broken):
        return None
