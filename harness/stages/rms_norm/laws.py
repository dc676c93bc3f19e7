"""Laws of the stage `rms_norm`; each function is one law and returns its terms."""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, alone, changed, in_two_parts, permuted


def _parts(call: Call) -> dict[str, Tensor]:
    """The operands with rows."""
    residual = call.keywords["residual"]
    return {"x": call.args["x"]} | ({} if residual is None else {"residual": residual})


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    return changed(call, **{name: tensor[rows] for name, tensor in _parts(call).items()})


def row_permutation(call: Call) -> list[Term]:
    """Permuted rows give permuted rows."""
    return permuted(call, len(call.args["x"]), _with_rows)


def batch_split(call: Call) -> list[Term]:
    """Two parts of a batch give the parts of the result."""
    return in_two_parts(call, len(call.args["x"]), _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A row is the same alone as in a batch."""
    return alone(call, len(call.args["x"]), _with_rows)


def weight_times_four(call: Call) -> list[Term]:
    """The weight times four gives the result times four."""
    return [Term(call, 4.0), Term(changed(call, weight=call.args["weight"] * 4.0), -1.0)]


def scale_with_eps(call: Call) -> list[Term]:
    """Rows times four and eps times sixteen give the same result."""
    larger = changed(call, **{name: tensor * 4.0 for name, tensor in _parts(call).items()})
    larger.keywords["eps"] = 16.0 * call.keywords["eps"]
    return [Term(call), Term(larger, -1.0)]


def residual_swapped(call: Call) -> list[Term]:
    """The sum does not tell its terms apart."""
    return [Term(call), Term(changed(call, x=call.keywords["residual"], residual=call.args["x"]), -1.0)]


def sum_then_norm(call: Call) -> list[Term]:
    """A residual of zeros adds nothing to x."""
    alone = changed(call)
    alone.keywords["residual"] = None
    return [Term(changed(call, residual=torch.zeros_like(call.args["x"]))), Term(alone, -1.0)]
