"""Laws of the stage `moe_block`; each function is one law and returns its terms."""

from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, alone, in_two_parts, permuted


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    new = call.like(dict(call.args), dict(call.keywords))
    new.args["hidden_states"] = new.arena.place("hidden_states", call.args["hidden_states"][rows])
    return new


def token_permutation(call: Call) -> list[Term]:
    """Permuted tokens give permuted rows."""
    return permuted(call, call.case.T, _with_rows)


def batch_split(call: Call) -> list[Term]:
    """Two parts of a batch give the parts of the result."""
    return in_two_parts(call, call.case.T, _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A token's row is the same alone as in a batch."""
    return alone(call, call.case.T, _with_rows)
