"""Laws of the stage `rope_cache`; each function is one law and returns its terms (of the result unless said)."""

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, alone, changed, in_two_parts, permuted
from moe_harness.reference.rope_cache import angles

WITH_ROWS = ("q", "k", "v", "positions", "slots")
VALUE_CACHE = 2  # its place among the outputs


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    return changed(call, **{name: call.args[name][rows] for name in WITH_ROWS})


def row_permutation(call: Call) -> list[Term]:
    """Permuted tokens give permuted rows."""
    return permuted(call, len(call.args["q"]), _with_rows)


def row_alone(call: Call) -> list[Term]:
    """A token is the same alone as in a batch."""
    together, by_itself = alone(call, len(call.args["q"]), _with_rows)

    def result(out: Tensor | tuple[Tensor, ...]) -> Tensor:  # batch invariance asks with all outputs
        return out[0] if isinstance(out, tuple) else out

    return [Term(call, rows=lambda out: together.rows(result(out))), Term(by_itself.call, -1.0, result)]


def batch_split(call: Call) -> list[Term]:
    """Two parts of a batch give the parts of the result."""
    return in_two_parts(call, len(call.args["q"]), _with_rows)


def _swapped(x: Tensor) -> Tensor:
    """The halves of every head change places."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], -1)


def turned_back(call: Call) -> list[Term]:
    """A rotation and its inverse add up to twice the cosine's part: R(p) + R(-p) = 2 cos(p) R(0).

    With the halves of a head swapped before and after, a rotation is its own inverse.
    """
    inverse, still = changed(call, q=_swapped(call.args["q"])), changed(call, positions=0 * call.args["positions"])
    cos, _ = _turn(call, call.args["positions"])
    return [Term(call), Term(inverse, rows=_swapped), Term(still, -2.0 * cos)]


def one_step_further(call: Call) -> list[Term]:
    """The rotation by p + 1 is that by p turned one step more: R(p + 1) = R(1) R(p)."""
    positions = call.args["positions"]
    cos, sin = _turn(call, torch.ones_like(positions))
    further = changed(call, positions=positions + 1)
    return [Term(further), Term(call, -cos), Term(changed(call), -sin, _swapped)]


def _turn(call: Call, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, with its sign in either half, of the angles at `positions`: [T, 1, D] each."""
    turn = angles(positions, call.args["q"].shape[-1], call.keywords["theta"])[:, None]
    return torch.cat([turn.cos(), turn.cos()], -1), torch.cat([-turn.sin(), turn.sin()], -1)


def value_times_four(call: Call) -> list[Term]:
    """Values are kept as they are: times four they are four times as large, and so is what lay there before."""
    larger = changed(call, v=call.args["v"] * 4.0, value_cache=call.args["value_cache"] * 4.0)
    return [Term(changed(call), 4.0, output=VALUE_CACHE), Term(larger, -1.0, output=VALUE_CACHE)]
