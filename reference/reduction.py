r"""What a tensor over a group is, what may be added to what, and where the one reduction of a layer goes.

    R  replicated: every rank holds the value          all_reduce:      P -> R
    P  partial:    the sum over the ranks is the value  reduce_scatter:  P -> S
    S  sharded:    each rank holds its own tokens       all_gather:      S -> R

    P + P = P,  R + R = R,  S + S = S;  anything else is illegal: P + R counts the R once per rank.

A factor that is equal on all ranks keeps the state; a nonlinearity of P is wrong.  Reducing R multiplies it by the
number of ranks.  All types below hold one tensor per rank, so that the whole algebra runs in one process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


class IllegalPlacement(TypeError):
    """A sum or a collective that gives a wrong value on these states."""


@dataclass(frozen=True)
class Placed:
    """One tensor per rank; subclasses say what they are together."""

    parts: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse parts that cannot be in this state."""

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Self:
        return cls(tuple(parts))

    def __add__(self, other: "Placed") -> Self:
        if type(self) is not type(other):
            raise IllegalPlacement(f"{type(self).__name__} + {type(other).__name__} is not a placement")
        return type(self)(tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def scaled(self, factor: float) -> Self:
        """Times a factor that is equal on all ranks."""
        return type(self)(tuple(part * factor for part in self.parts))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A function of each element, which need not be linear."""
        return type(self)(tuple(function(part) for part in self.parts))

    def _refuse(self, collective: str, why: str) -> IllegalPlacement:
        return IllegalPlacement(f"{collective} of {type(self).__name__}: {why}")

    def all_reduce(self) -> "Replicated":
        raise self._refuse("all_reduce", "only a Partial is summed over ranks")

    def reduce_scatter(self, sizes: Sequence[int]) -> "Sharded":
        raise self._refuse("reduce_scatter", "only a Partial is summed over ranks")

    def all_gather(self) -> "Replicated":
        raise self._refuse("all_gather", "only what is Sharded by token is gathered")


class Replicated(Placed):
    """Equal on every rank; construction checks that it is."""

    def check(self) -> None:
        if any(not torch.equal(self.parts[0], part) for part in self.parts[1:]):
            raise IllegalPlacement("the parts of a Replicated differ between ranks")

    def value(self) -> Tensor:
        return self.parts[0]

    def shard(self, sizes: Sequence[int]) -> "Sharded":
        """Each rank keeps its own rows (sequence parallel)."""
        return Sharded(tuple(self.parts[0].split(list(sizes))))


class Partial(Placed):
    """Rank r's part of a sum."""

    def value(self) -> Tensor:
        return torch.stack(self.parts).sum(0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        raise self._refuse("a function", "a nonlinearity of a partial sum is not the partial sum of it")

    def all_reduce(self) -> Replicated:
        return Replicated((self.value(),) * len(self.parts))

    def reduce_scatter(self, sizes: Sequence[int]) -> "Sharded":
        return Sharded(tuple(self.value().split(list(sizes))))


class Sharded(Placed):
    """Rank r's own rows."""

    def value(self) -> Tensor:
        return torch.cat(self.parts)

    def all_gather(self) -> Replicated:
        return Replicated((self.value(),) * len(self.parts))


def reduction(routed: Placed, shared: Placed, *, sizes: Sequence[int] | None = None) -> Placed:
    """The layer's output from its routed and its shared part, with every reduction in its place.

    | routed               | shared Partial                       | shared Replicated                 |
    |----------------------|--------------------------------------|-----------------------------------|
    | Partial              | add, then the one all_reduce         | all_reduce routed, then add       |
    | Sharded              | shared reduced by itself, then added | own rows of it added              |
    | Partial, with sizes  | add, then the one reduce_scatter     | reduce_scatter, then add own rows |

    Args:
        sizes: rows per rank, where the result is to be sharded by token (sequence parallel).
    """
    if isinstance(routed, Sharded):
        rows = sizes or [len(part) for part in routed.parts]
        return routed + (shared if isinstance(shared, Sharded) else _own_rows(shared, rows))
    if isinstance(routed, Partial) and isinstance(shared, Partial):
        return _after_reduction(routed + shared, sizes)
    reduced = _after_reduction(routed, sizes)
    return reduced + (_own_rows(shared, sizes) if sizes is not None else _after_reduction(shared, None))


def _after_reduction(placed: Placed, sizes: Sequence[int] | None) -> Placed:
    if not isinstance(placed, Partial):
        return placed if sizes is None else _own_rows(placed, sizes)
    return placed.all_reduce() if sizes is None else placed.reduce_scatter(sizes)


def _own_rows(placed: Placed, sizes: Sequence[int]) -> Placed:
    if isinstance(placed, Partial):
        return placed.reduce_scatter(sizes)
    return placed.shard(sizes) if isinstance(placed, Replicated) else placed
