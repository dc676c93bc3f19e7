"""Cases of the stage `reduction`: frozen specs with ids that replay, and the plan of a run; no torch.

reduction/reduction/R=2,T=3+3,routed=partial,shared=replicated      rows of rank 0 and rank 1
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_cases import DTYPES, LAYOUTS, laid_out, numbers, one_of

STATES = ("partial", "replicated", "complete")
DATA = ("normal", "infinite")


@dataclass(frozen=True, kw_only=True)
class ReductionCase(Case):
    """The one reduction of a layer over R ranks: each holds its own part of the routed and of the shared output.

    T tells the rows that belong to each rank of a group.  A part that is "complete" over the rank's own rows has those
    alone, every other part has all of them; with `sequence` each rank keeps its own of the result.
    """

    stage: ClassVar[str] = "reduction"
    R: int
    T: str
    H: int = 16
    routed: str = "partial"
    shared: str = "replicated"
    sequence: bool = False
    groups: int = 1  # into how many groups the ranks are split; each reduces for itself

    def __post_init__(self) -> None:
        one_of("routed", self.routed, STATES)
        one_of("shared", self.shared, (*STATES, "none"))
        one_of("dtype", self.dtype, DTYPES)
        one_of("data", self.data, DATA)
        laid_out(self.layout, ("routed", "shared"))
        if self.groups < 1 or self.R % self.groups:
            raise UsageError(f"groups is {self.groups}, which does not divide R, {self.R}")
        if len(self.tokens) != self.members:
            raise UsageError(f"T is {self.T!r}, which is {len(self.tokens)} ranks, but a group has {self.members}")
        if self.shared == "complete" and self.routed != "complete":
            raise UsageError(f"a shared part of own rows cannot be added to a routed part that is {self.routed}")

    @property
    def members(self) -> int:
        """Ranks of one group."""
        return self.R // self.groups

    @property
    def tokens(self) -> list[int]:
        return numbers(self.T)

    def rows(self) -> int:
        return sum(self.tokens)

    def core(self) -> bool:
        """All rows on every rank, of one group: sequence parallel rows may be refused."""
        return super().core() and not self.sequence and self.groups == 1

    def part(self) -> str:
        """A layer has one sum of states: what expert parallel ones reduce is not what tensor parallel ones do."""
        return f"{self.dtype}, {self.routed} + {self.shared}"


CaseType = ReductionCase

RAGGED = [2, 0, 5, 1, 4, 0, 7, 1]
LAID_OUT = [2, 3, 5, 2, 4, 3, 7, 2]  # one row has no strides that a collective could refuse
# (routed, shared) of every legal sum; with sequence parallel rows the last two hold parts of unequal height
SUMS = (
    *(("partial", shared) for shared in ("none", "partial", "replicated")),
    *(("replicated", shared) for shared in ("none", "partial", "replicated")),
    *(("complete", shared) for shared in ("none", "complete", "partial", "replicated")),
)


def plan(worlds: Sequence[int], *, profile: str = "quick", seed: int = 0) -> Iterator[Planned]:
    """Every sum of states, with and without sequence parallel rows, on even, ragged and no rows, over all ranks and
    over each half of them; then in every layout, with an infinity, and larger than what is summed at once."""
    for ranks, repeat in itertools.product(worlds, range(1 if profile == "quick" else 3)):
        for groups in (1, 2) if ranks % 2 == 0 else (1,):
            counts = _rows_of(ranks // groups)
            for i, (sums, sequence, rows) in enumerate(itertools.product(SUMS, (False, True), counts)):
                yield _planned(sums, sequence, rows, i, R=ranks, groups=groups, seed=seed + repeat * 1000 + i)
        yield from _unusual(ranks, seed + repeat * 1000 + 500)
        yield from _large(ranks, seed + repeat * 1000 + 600)


def _planned(sums: tuple[str, str], sequence: bool, rows: Sequence[int], i: int, **fields: Any) -> Planned:
    (routed, shared), optional = sums, sequence and sums in (("complete", "partial"), ("complete", "replicated"))
    optional |= "layout" in fields
    chosen = {"H": (16, 8, 33)[i % 3], "dtype": DTYPES[i % len(DTYPES)]} | fields
    tokens = "+".join(map(str, rows))
    case = ReductionCase(T=tokens, routed=routed, shared=shared, sequence=sequence, optional=optional, **chosen)
    return Planned("reduction", case)


def _rows_of(members: int) -> list[list[int]]:
    return [[3] * members, RAGGED[:members], [0] * members, [*[1] * (members - 1), 257]]


def _unusual(ranks: int, seed: int) -> Iterator[Planned]:
    """Operands that do not lie one row behind the other, which may be refused, and one infinite element, which changes
    no other."""
    for i, (sums, sequence) in enumerate(itertools.product(SUMS, (False, True))):
        operand = "routed" if sums[1] == "none" or i // 2 % 2 else "shared"
        layout = f"{operand}:{LAYOUTS[i % len(LAYOUTS)]}"
        yield _planned(sums, sequence, LAID_OUT[:ranks], i // 2, R=ranks, layout=layout, seed=seed + i)
        yield _planned(sums, sequence, RAGGED[:ranks], i // 2, R=ranks, data="infinite", seed=seed + i)


def _large(ranks: int, seed: int) -> Iterator[Planned]:
    """More columns than a block and more bytes than usual buffers have: over 1 MiB in fp32, half of it in 16 bits."""
    for i, (sums, sequence) in enumerate(itertools.product(SUMS[:3], (False, True))):
        rows = [-(-129 // ranks)] * ranks if i % 2 else [*[1] * (ranks - 1), 130 - ranks]
        yield _planned(sums, sequence, rows, i // 2, R=ranks, H=2049, seed=seed + i)
