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
from moe_harness.harness.core.folders import needed_part


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


def terms(stage: str, law: str, call: Call) -> list[Term]:
    """The terms of a law of `stage` on a call."""
    return getattr(needed_part(stage, "laws"), law)(call)
