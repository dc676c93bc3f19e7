"""The stage `grouped_linear`: data whose faults show, and the bound of a right result."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import INTS, Builder, Call
from moe_harness.harness.core.ranked_cases import numbers
from moe_harness.harness.core.stage import Declared, Output, Stage
from moe_harness.harness.stages.grouped_linear.bound import grouped_linear_bound
from moe_harness.harness.stages.grouped_linear.cases import GroupedLinearCase
from moe_harness.reference.grouped_linear import grouped_linear, row_experts

EXACT_TERMS = 5  # products of at most 3 * 16, bias 8: sums stay under 256


class GroupedLinear(Stage):
    """One product for each group of rows."""

    batched = ("x",)

    def build(self, case: GroupedLinearCase, device: str) -> Call:
        draw = Builder(case, device)
        sizes = _sizes(case, draw)
        if case.data == "exact":
            x, weight, bias = _exact(case, draw)
        else:
            x = draw.large_normal(case.S, case.K)
            weight = draw.large_normal(case.E, case.N, case.K, scale=case.K**-0.5)
            bias = draw.large_normal(case.E, case.N)
            _make_special(case, x, weight, sizes)
        args = {
            "x": draw.place("x", x),
            "weight": draw.place("weight", weight),
            "group_sizes": draw.place("group_sizes", sizes, INTS[case.ints]),
        }
        return Call(case, args, {"bias": draw.place("bias", bias) if case.bias else None}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        x, weight, _ = call.args.values()
        return [Output("the result", (x.shape[0], weight.shape[1]), x.dtype)]

    def expect(self, call: Call, declared: Declared) -> bounds.Bound:
        return grouped_linear_bound(*call.args.values(), **call.keywords, declared=declared)

    def exact_value(self, call: Call) -> Tensor:
        """The only right result of an exact case, [S, N] in fp64."""
        x, weight, sizes = call.args.values()
        return grouped_linear(x.double(), weight, sizes, **call.keywords)

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        return {"row": row, "column": column, "expert": int(row_experts(call.args["group_sizes"])[row])}

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        experts = row_experts(call.args["group_sizes"])
        return {f"expert {e}": experts == e for e in experts.unique().tolist()[:16]}

    def cut(self, call: Call, rows: Tensor) -> Call:
        """The sizes of the groups follow; only the experts of these rows and their neighbours stay."""
        made = super().cut(call, rows)
        weight, bias = call.args["weight"], call.keywords["bias"]
        owners = row_experts(call.args["group_sizes"])[rows]
        kept = torch.cat([owners, (owners + 1) % max(1, len(weight))]).unique()
        sizes = torch.bincount(torch.searchsorted(kept, owners), minlength=len(kept))
        made.args |= {"weight": weight[kept], "group_sizes": sizes}
        made.keywords = {"bias": None if bias is None else bias[kept]}
        return made


STAGE = GroupedLinear()


def _sizes(case: GroupedLinearCase, draw: Builder) -> Tensor:
    """Rows of each expert, [E], summing to S (an "expanded" layout gives every expert the same)."""
    everyone = case.E
    if case.layout == "group_sizes:expanded":
        return torch.full((everyone,), case.S // everyone)
    if "+" in case.sizes:
        return torch.tensor(numbers(case.sizes))
    if case.sizes in ("first", "last"):
        owners = torch.full((case.S,), 0 if case.sizes == "first" else everyone - 1)
    elif case.sizes == "even":
        owners = torch.arange(case.S) % everyone
    elif case.sizes == "ones":  # one row each, the rest on one expert in the middle
        owners = torch.arange(case.S).where(torch.arange(case.S) < everyone, torch.tensor(everyone // 2))
    elif (
        case.sizes == "sparse"
    ):  # every third expert has rows, so that runs of empty groups lie between and at the ends
        owners = draw.integers(0, max(1, everyone // 3), (case.S,)) * 3 + (1 if everyone > 3 else 0)
    else:
        owners = draw.integers(0, everyone, (case.S,))
    return torch.bincount(owners.clamp(max=everyone - 1), minlength=everyone)


def _exact(case: GroupedLinearCase, draw: Builder) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers; each row of a weight has few entries, walking the columns from the last one down."""
    x = draw.integers(1, 17, (case.S, case.K)) * draw.signs(case.S, case.K)
    weight = torch.zeros(case.E, case.N, case.K, dtype=draw.dtype)
    start = draw.integers(0, case.K, (case.E, 1, 1))
    start[::2] = 0
    for term in range(min(EXACT_TERMS - 1, case.K)):
        at = (case.K - 1 - (torch.arange(case.N).view(1, -1, 1) + start + term * case.N)) % case.K
        if term and case.K > 1:
            at = draw.integers(0, case.K, (case.E, case.N, 1))
        values = draw.integers(1, 4, tuple(at.shape)) * draw.signs(*at.shape)
        weight.scatter_(2, at, values.to(weight.dtype))
    return x, weight, draw.integers(-8, 9, (case.E, case.N)).double()


def _make_special(case: GroupedLinearCase, x: Tensor, weight: Tensor, sizes: Tensor) -> None:
    used = int(sizes.argmax())
    if case.data in ("row_nan", "row_inf"):
        x[case.S // 2, case.K // 3] = float(case.data.removeprefix("row_"))
    elif case.data in ("expert_nan", "expert_inf"):
        weight[used, :, 0] = float(case.data.removeprefix("expert_"))
    elif case.data == "unused_expert_nan":
        weight[sizes == 0] = float("nan")
    elif case.data == "tiny":
        x *= 2.0**-8
    elif case.data == "huge":
        x *= 2.0**10
    elif case.data == "outside_fp16":
        x[::2] *= 2.0**17
        x[1::2] *= 2.0**-26
    elif case.data == "cancelling":
        x[:, 1::2] = x[:, 0::2]
        weight[:, :, 1::2] = -0.9375 * weight[:, :, 0::2]
