"""Laws of the stage `shared_expert_gate`; each function is one law and returns its terms."""

from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, alone, changed, in_two_parts, permuted


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    return changed(call, **{name: call.args[name][rows] for name in ("hidden_states", "shared_output")})


def row_permutation(call: Call) -> list[Term]:
    """Permuted rows give permuted rows."""
    return permuted(call, len(call.args["hidden_states"]), _with_rows)


def batch_split(call: Call) -> list[Term]:
    """Two parts of a batch give the parts of the result."""
    return in_two_parts(call, len(call.args["hidden_states"]), _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A row is the same alone as in a batch."""
    return alone(call, len(call.args["hidden_states"]), _with_rows)


def power_of_two(call: Call) -> list[Term]:
    """The shared expert's output times four gives the result times four."""
    return [Term(call, 4.0), Term(changed(call, shared_output=call.args["shared_output"] * 4.0), -1.0)]


def additivity(call: Call) -> list[Term]:
    """The result is additive in the shared expert's output."""
    shared = call.args["shared_output"]
    left, right = shared.clone(), shared.clone()
    left[..., ::2], right[..., 1::2] = 0, 0
    return [Term(call), Term(changed(call, shared_output=left), -1.0), Term(changed(call, shared_output=right), -1.0)]


def reshape(call: Call) -> list[Term]:
    """More leading dimensions change nothing but the shape."""
    a = {name: call.args[name].unflatten(0, (2, -1)) for name in ("hidden_states", "shared_output")}
    return [Term(call), Term(changed(call, **a), -1.0, lambda out: out.flatten(0, 1))]
