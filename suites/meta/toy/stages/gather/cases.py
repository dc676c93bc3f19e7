"""Cases of the stage `gather`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_cases import DTYPES, numbers


@dataclass(frozen=True, kw_only=True)
class GatherCase(Case):
    stage: ClassVar[str] = "gather"
    R: int
    T: str

    def rows(self) -> int:
        return sum(numbers(self.T))


CaseType = GatherCase


def plan(worlds: Sequence[int], *, profile: str = "quick", seed: int = 0) -> Iterator[Planned]:
    """Equal and ragged rows."""
    for ranks in worlds:
        for number, rows in enumerate(("2+" * ranks, "0+3+" * ranks)):
            counts = "+".join(rows.split("+")[:ranks])
            yield Planned("rows", GatherCase(R=ranks, T=counts, dtype=DTYPES[number], seed=seed + number))
