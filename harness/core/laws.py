"""Relations between results that hold for any right implementation, whatever the reference says.

A law is a sum of terms, coefficient * rows(result of a call), that is zero up to the rounding of every term; it is
judged as any result is, with the variance of the sum.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.registry import needed_part


@dataclass
class Term:
    """One result in a relation.  `rows` picks and orders rows of the result; linear in it, exact.

    A module of laws may judge them in a way of its own (`judge(trial, call, terms)`); then `rows` may do anything.
    """

    call: Call
    coefficient: float | Tensor = 1.0
    rows: Callable[[Any], Any] = field(default=lambda result: result)
    output: int = 0  # which of several outputs it is about


def changed(call: Call, **operands: Any) -> Call:
    """The call with some operands replaced by new values (contiguous, in fences of their own)."""
    new = call.like(dict(call.args), dict(call.keywords))
    for name, tensor in {**call.args, **call.keywords}.items():
        values = operands.get(name, tensor)
        if isinstance(values, Tensor):
            placed = new.arena.place(name, values.to(tensor.dtype))
            (new.args if name in call.args else new.keywords)[name] = placed
    return new


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of [0, count) that moves something wherever it can."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + 17))


WithRows = Callable[[Call, Any], Call]  # a stage's call on some rows, chosen by a slice or by their numbers


def permuted(call: Call, size: int, with_rows: WithRows) -> list[Term]:
    """`size` rows in another order give the rows of the result in that order."""
    order = shuffled(size, call.case.seed)
    return [Term(call, rows=lambda out: out[order]), Term(with_rows(call, order), -1.0)]


def alone(call: Call, size: int, with_rows: WithRows) -> list[Term]:
    """One of `size` rows by itself gives its row of the result."""
    row = call.case.seed % size
    only = slice(row, row + 1)
    return [Term(call, rows=lambda out: out[only]), Term(with_rows(call, only), -1.0)]


def in_two_parts(call: Call, size: int, with_rows: WithRows) -> list[Term]:
    """The first third of `size` rows and the others give the parts of the result."""
    cut = size // 3

    def padded(before: int, after: int) -> Callable[[Tensor], Tensor]:
        return lambda out: torch.cat([out.new_zeros(before, *out.shape[1:]), out, out.new_zeros(after, *out.shape[1:])])

    head, tail = with_rows(call, slice(0, cut)), with_rows(call, slice(cut, None))
    return [Term(call), Term(head, -1.0, padded(0, size - cut)), Term(tail, -1.0, padded(cut, 0))]


def terms(stage: str, law: str, call: Call) -> list[Term]:
    """The terms of a law of `stage` on a call."""
    return getattr(needed_part(stage, "laws"), law)(call)
