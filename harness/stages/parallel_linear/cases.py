"""Cases of the stage `parallel_linear`: frozen specs with ids that replay, and the plan of a run; no torch.

parallel_linear/shard/R=2,kind=row,E=3,K=8,N=6,S=3+0+2      rows of each of three experts
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_cases import DTYPES, numbers, one_of

KINDS = ("replicated", "column", "merged_column", "row")


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A layer of `kind` over R ranks: E experts, K in, N out per weight, S rows of each expert.

    A merged column's weights have `parts` times N out: "3+1+2" are three of them.
    """

    stage: ClassVar[str] = "parallel_linear"
    R: int
    E: int
    K: int
    N: int
    S: str
    kind: str
    parts: str = "1+1"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        one_of("dtype", self.dtype, DTYPES)
        if len(self.group_sizes) != self.E:
            raise UsageError(f"S is {self.S!r}, which is {len(self.group_sizes)} experts, but E is {self.E}")
        if self.kind == "row" and self.is_uneven:
            raise UsageError(f"K is {self.K}, which {self.R} ranks cannot share: what each is given is not defined")

    @property
    def is_uneven(self) -> bool:
        """Whether the ranks cannot share evenly what this kind splits."""
        return self.R > 1 and bool({"row": self.K, "replicated": 0}.get(self.kind, self.N) % self.R)

    @property
    def group_sizes(self) -> list[int]:
        return numbers(self.S)

    @property
    def out_features(self) -> list[int]:
        """Of each weight of an expert."""
        return [part * self.N for part in numbers(self.parts)] if self.kind == "merged_column" else [self.N]

    def rows(self) -> int:
        return sum(self.group_sizes)

    def core(self) -> bool:
        """A merged column may be for gate and up alone."""
        return super().core() and self.parts == type(self).parts


CaseType = LinearCase


def plan(worlds: Sequence[int], *, profile: str = "quick", seed: int = 0, kind: str = KINDS[0]) -> Iterator[Planned]:
    """Square and tall weights, empty experts, no rows at all, for a layer of this kind; sizes that ranks can share."""
    rows = ("3+0+2", "0+0+0", "1+1+1", "0+0+9", "17+4+0")
    for ranks, repeat in itertools.product(worlds, range(1 if profile == "quick" else 3)):
        for i, (inner, outer) in enumerate(((1, 1), (2, 1), (1, 2), (3, 2), (4, 4))):
            dtype, number = DTYPES[i % len(DTYPES)], seed + repeat * 1000 + i
            size: dict[str, Any] = {"K": 4 * inner * ranks, "N": 4 * outer * ranks, "S": rows[i], "E": 3}
            yield Planned("shard", LinearCase(R=ranks, kind=kind, dtype=dtype, seed=number, **size))
        for case in (*_large_layers(ranks, kind), *_uneven_layers(ranks, kind), *_merged_layers(ranks, kind)):
            yield Planned("shard", case.but(seed=seed + repeat * 1000 + case.seed))


# (K, N, rows of each expert): sizes past a usual tile on either side, up to 16 experts; what the ranks share becomes
# the next multiple of their number, the other stays as it is.
LAYERS = (
    (256, 320, "3+0+2+1+0+4+1+2"),
    (257, 129, "1+0+0+5+2+0+1+3+7"),
    (65, 513, "2+1+1+3"),
    (130, 33, "0+1+0+2+0+0+1+0+3+0+1+0+0+0+2+1"),
    (511, 257, "33+0+1+17+64"),
)


def _large_layers(ranks: int, kind: str) -> Iterator[LinearCase]:
    for i, (inner, outer, rows) in enumerate(LAYERS):
        inner = _shared_by(ranks, inner) if kind == "row" else inner
        outer = _shared_by(ranks, outer) if kind in ("column", "merged_column") else outer
        experts, dtype = len(numbers(rows)), DTYPES[i % len(DTYPES)]
        yield LinearCase(R=ranks, kind=kind, K=inner, N=outer, S=rows, E=experts, dtype=dtype, seed=100 + i)


def _uneven_layers(ranks: int, kind: str) -> Iterator[LinearCase]:
    """Outputs that the ranks cannot share evenly: outside the contract, refused in any way, or right side by side."""
    if ranks > 1 and kind in ("column", "merged_column"):
        for outer in (5 * ranks + 1, ranks + 1):
            yield LinearCase(R=ranks, kind=kind, K=12, N=outer, S="3+0+2+1", E=4, optional=True, seed=200 + outer)


def _merged_layers(ranks: int, kind: str) -> Iterator[LinearCase]:
    """Weights of other sizes, as those of queries, keys and values, and other numbers of them.

    A layer for gate and up alone may refuse them.
    """
    for i, parts in enumerate(("4+1+1", "1+3", "2", "1+2+1+3")[: 4 if kind == "merged_column" else 0]):
        fields: dict[str, Any] = {"K": 12 + 8 * i, "N": (2 + i) * ranks, "S": "3+0+2", "E": 3}
        dtype, number = DTYPES[i % len(DTYPES)], 300 + i
        yield LinearCase(R=ranks, kind=kind, parts=parts, dtype=dtype, optional=True, seed=number, **fields)


def _shared_by(ranks: int, size: int) -> int:
    return -(-size // ranks) * ranks
