"""Standard wrong outputs of the stage `grouped_linear`, and the data that cannot tell them."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Excuse, Wrong, common, without_last
from moe_harness.reference.grouped_linear import grouped_linear, row_experts

NAMES = (
    "all_zeros", "doubled", "bias_dropped", "bias_of_next_expert", "groups_shifted_by_a_row", "experts_rotated",
    "last_16_of_K_dropped", "last_of_K_dropped", "one_row_zeroed", "one_element_off", "one_row_to_wrong_expert",
)  # fmt: skip

EXCUSES = (
    Excuse("groups_shifted_by_a_row", lambda c: c.layout == "weight:expanded", "all experts are one"),
    Excuse("experts_rotated", lambda c: c.layout == "weight:expanded", "all experts are one"),
    Excuse("one_row_to_wrong_expert", lambda c: c.layout == "weight:expanded", "all experts are one"),
    Excuse("bias_of_next_expert", lambda c: c.layout == "bias:expanded", "all biases are one"),
)


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call."""
    return linear(*call.args.values(), bias=call.keywords["bias"])


def linear(x: Tensor, weight: Tensor, sizes: Tensor, *, bias: Tensor | None) -> Wrong:
    """Name -> wrong [S, N] in fp64."""
    rows = x.double()
    if not rows.numel() or not weight.numel():
        return {}

    def run(rows: Tensor = rows, sizes: Tensor = sizes, weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
        return grouped_linear(rows, weight, sizes, bias=bias)

    value = run()
    found = common(value)
    found["last_16_of_K_dropped"] = run(rows=without_last(rows, 16))
    found["last_of_K_dropped"] = run(rows=without_last(rows, 1))
    if bias is not None:
        found["bias_dropped"] = run(bias=None)
    if len(weight) > 1:
        found |= _misgrouped(run, value, rows, weight, sizes, bias)
    return {name: found[name] for name in NAMES if name in found}


def _misgrouped(
    run: Callable, value: Tensor, rows: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None
) -> Wrong:
    """Rows that meet another expert than theirs."""
    owners = row_experts(sizes)
    found: Wrong = {"experts_rotated": run(weight=weight.roll(1, 0), bias=None if bias is None else bias.roll(1, 0))}
    if bias is not None:
        found["bias_of_next_expert"] = run(bias=bias.roll(-1, 0))
    row = len(rows) // 2
    other = (int(owners[row]) + 1) % len(weight)
    found["one_row_to_wrong_expert"] = value.clone()
    moved = rows[row] @ weight[other].double().T
    found["one_row_to_wrong_expert"][row] = moved if bias is None else moved + bias[other].double()
    if bool((owners[1:] != owners[:-1]).any()):
        shifted = torch.cat([owners[:1], owners[:-1]])  # every group begins a row late
        found["groups_shifted_by_a_row"] = run(sizes=torch.bincount(shifted, minlength=len(weight)))
    return found
