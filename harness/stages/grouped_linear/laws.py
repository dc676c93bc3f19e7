"""Laws of the stage `grouped_linear`; each function is one law and returns its terms."""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, alone, changed, in_two_parts, shuffled
from moe_harness.reference.grouped_linear import row_experts


def _with_rows(call: Call, rows: slice) -> Call:
    """These rows, and the sizes that are left of the groups."""
    sizes = call.args["group_sizes"]
    return changed(call, x=call.args["x"][rows], group_sizes=row_experts(sizes)[rows].bincount(minlength=len(sizes)))


def row_permutation(call: Call) -> list[Term]:
    """Rows permuted within their groups give permuted rows."""
    experts = row_experts(call.args["group_sizes"]).cpu()
    order = shuffled(call.case.S, call.case.seed)
    order = order[experts[order].argsort(stable=True)]
    return [Term(call, rows=lambda out: out[order]), Term(changed(call, x=call.args["x"][order]), -1.0)]


def expert_relabelling(call: Call) -> list[Term]:
    """Experts may be renumbered, with their weights, sizes and rows."""
    a = call.args
    order = shuffled(call.case.E, call.case.seed)
    starts = torch.cat([a["group_sizes"].new_zeros(1), a["group_sizes"].cumsum(0)]).tolist()
    rows = torch.cat([torch.arange(starts[e], starts[e + 1]) for e in order.tolist()])
    bias = call.keywords["bias"]
    renamed = changed(call, x=a["x"][rows], weight=a["weight"][order], group_sizes=a["group_sizes"][order],
                      **({} if bias is None else {"bias": bias[order]}))  # fmt: skip
    return [Term(call, rows=lambda out: out[rows]), Term(renamed, -1.0)]


def batch_split(call: Call) -> list[Term]:
    """The first and the other rows, each with the sizes left to them, give the parts of the result."""
    return in_two_parts(call, call.case.S, _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A row is the same alone as among others."""
    return alone(call, call.case.S, _with_rows)


def power_of_two(call: Call) -> list[Term]:
    """Rows times four give the result times four."""
    return [Term(call, 4.0), Term(changed(call, x=call.args["x"] * 4.0), -1.0)]


def additivity(call: Call) -> list[Term]:
    """Two parts of the columns, the others zero, add up to the whole."""
    x, cut = call.args["x"], call.case.K // 3
    left, right = x.clone(), x.clone()
    left[:, cut:], right[:, :cut] = 0, 0
    return [Term(call), Term(changed(call, x=left), -1.0), Term(changed(call, x=right), -1.0)]


def empty_expert_inserted(call: Call) -> list[Term]:
    """An expert without rows may be added anywhere, whatever its weights hold."""
    a, at, bias = call.args, call.case.E // 2, call.keywords["bias"]

    def inserted(values: Tensor, new: Tensor) -> Tensor:
        return torch.cat([values[:at], new, values[at:]])

    operands = {
        "weight": inserted(a["weight"], torch.full_like(a["weight"][:1], float("nan"))),
        "group_sizes": inserted(a["group_sizes"], a["group_sizes"].new_zeros(1)),
    }
    if bias is not None:
        operands["bias"] = inserted(bias, torch.full_like(bias[:1], float("nan")))
    more = changed(call, **operands)
    return [Term(call), Term(more, -1.0)]
