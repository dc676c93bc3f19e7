"""Laws of the stage `moe_block`; each function is one law and returns its terms."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.laws import Term, shuffled


def _with_rows(call: Call, rows: Tensor | slice) -> Call:
    new = call.like(dict(call.args), dict(call.keywords))
    new.args["hidden_states"] = new.arena.place("hidden_states", call.args["hidden_states"][rows])
    return new


def token_permutation(call: Call) -> list[Term]:
    """Permuted tokens give permuted rows."""
    order = shuffled(call.case.T, call.case.seed)
    return [Term(call, rows=lambda out: out[order]), Term(_with_rows(call, order), -1.0)]


def batch_split(call: Call) -> list[Term]:
    """Two parts of a batch give the parts of the result."""
    size, cut = call.case.T, call.case.T // 3

    def padded(before: int, after: int) -> Any:
        return lambda out: torch.cat([out.new_zeros(before, out.shape[1]), out, out.new_zeros(after, out.shape[1])])

    head, tail = _with_rows(call, slice(0, cut)), _with_rows(call, slice(cut, None))
    return [Term(call), Term(head, -1.0, padded(0, size - cut)), Term(tail, -1.0, padded(cut, 0))]


def row_alone(call: Call) -> list[Term]:
    """A token's row is the same alone as in a batch."""
    row = call.case.seed % call.case.T
    return [Term(call, rows=lambda out: out[row : row + 1]), Term(_with_rows(call, slice(row, row + 1)), -1.0)]
