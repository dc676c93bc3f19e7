"""Cases of the stage `dispatcher`: frozen specs with ids that replay, and the plan of a run; no torch.

dispatcher/dense/R=2,E=3,k=1,T=0+2      tokens of rank 0 and rank 1; fields at their default left out
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_cases import DTYPES, LAYOUTS, laid_out, numbers, one_of

OWNERS = ("block", "cyclic", "random", "last_empty", "one")
OPERANDS = ("hidden_states", "topk_weights", "topk_ids", "expert_output")  # what a layout may be of
ROUTINGS = ("plain", "masked", "duplicates", "hot", "none", "nan")


@dataclass(frozen=True, kw_only=True)
class DispatcherCase(Case):
    """R ranks with T tokens each, E experts placed by `owner`, routed as `ids` says.

    With `copies` there are E + copies physical experts, each of which holds one of the E.  With `groups` the ranks are
    in that many expert parallel groups, all with the same tokens and experts; each group computes its share of every
    expert, as where experts are sharded over a second axis of the ranks, and T tells the tokens of a group's ranks.
    """

    stage: ClassVar[str] = "dispatcher"
    R: int
    E: int
    k: int
    T: str
    H: int = 16
    owner: str = "block"
    ids: str = "plain"
    copies: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        one_of("owner", self.owner, OWNERS)
        one_of("ids", self.ids, ROUTINGS)
        one_of("dtype", self.dtype, DTYPES)
        laid_out(self.layout, OPERANDS)
        if self.groups < 1 or self.R % self.groups:
            raise UsageError(f"groups is {self.groups}, which does not divide R, {self.R}")
        if len(self.tokens) != self.members:
            what = "R is" if self.groups == 1 else "a group has"
            raise UsageError(f"T is {self.T!r}, which is {len(self.tokens)} ranks, but {what} {self.members}")
        if self.copies < 0:
            raise UsageError(f"copies is {self.copies}, but should be a number of additional experts")
        if not 1 <= self.k <= min(self.E, 10):
            raise UsageError(f"k is {self.k}, but should be in 1..{min(self.E, 10)} (exact sums need k <= 10)")
        if self.H < 8:
            raise UsageError(f"H is {self.H}, but should be at least 8: six columns hold the tag of the token")

    @property
    def members(self) -> int:
        """Ranks of one expert parallel group."""
        return self.R // self.groups

    @property
    def tokens(self) -> list[int]:
        return numbers(self.T)

    def rows(self) -> int:
        return sum(self.tokens)

    def core(self) -> bool:
        """As many tokens on every rank, equal blocks of experts: what no dispatcher needs to refuse."""
        plain = not self.copies and self.groups == 1 and self.owner == "block" and not self.E % self.R
        return super().core() and plain and self.ids in ("plain", "hot") and len(set(self.tokens)) == 1


CaseType = DispatcherCase

# (E, k): E below, at and not divisible by the ranks; k = 1, k = E, released pairs
EXPERTS = ((1, 1), (2, 1), (3, 2), (5, 5), (7, 3), (8, 2), (60, 4), (128, 8))
# (tokens of the longest rank, E, k): past usual block sizes, and more experts than most kernels have counters for
LARGE = ((256, 60, 4), (257, 1025, 8), (513, 8, 2), (65, 1025, 10))
# Experts of each rank and k, in equal blocks: all that many dispatchers accept
BLOCKS = ((1, 1), (2, 2), (3, 1), (8, 4), (32, 8))


def _token_counts(ranks: int) -> list[list[int]]:
    """Equal, one empty rank first and last, all empty, a single token, ragged."""
    ragged = [3, 0, 5, 1, 2, 4, 0, 7]
    counts = [[4] * ranks, [0, *[2] * (ranks - 1)], [*[3] * (ranks - 1), 0], [0] * ranks, [1, *[0] * (ranks - 1)]]
    return [*counts, ragged[:ranks], [17, *[1] * (ranks - 1)]]


def plan(worlds: Sequence[int], *, profile: str = "quick", seed: int = 0, copies: bool = False) -> Iterator[Planned]:
    """Cases over these numbers of ranks in a fixed order; every pair of axis values occurs, in "full" with three seeds.

    `copies` adds cases with redundant experts.
    """
    for ranks, repeat in itertools.product(worlds, range(1 if profile == "quick" else 3)):
        counts = _token_counts(ranks)
        for i in range(max(len(EXPERTS) * 3, len(counts) * len(ROUTINGS))):
            experts, top_k = EXPERTS[(i + i // len(EXPERTS)) % len(EXPERTS)]
            case = DispatcherCase(
                R=ranks,
                E=experts,
                k=top_k,
                T="+".join(map(str, counts[i % len(counts)])),
                H=(16, 8, 33)[i % 3],
                owner=OWNERS[(i + i // len(OWNERS)) % len(OWNERS)],
                ids=ROUTINGS[(i // len(counts)) % len(ROUTINGS)],
                dtype=DTYPES[(i // 2) % len(DTYPES)],
                seed=seed + repeat * 1000 + i,
            )
            yield Planned("live" if i % 5 == 4 else "dense", case)
        yield from _core(ranks, seed + repeat * 1000 + 100)
        yield from _large(ranks, seed + repeat * 1000 + 200)
        yield from _equal_blocks(ranks, seed + repeat * 1000 + 300)
        yield from _over_two_axes(ranks, seed + repeat * 1000 + 400)
        yield from _unusual(ranks, seed + repeat * 1000 + 600)
        if copies:
            yield from _redundant(ranks, seed + repeat * 1000 + 500)


def _core(ranks: int, seed: int) -> Iterator[Planned]:
    """In every dtype what no dispatcher needs to refuse."""
    for i, dtype in enumerate(DTYPES):
        tokens = "+".join(["5"] * ranks)
        yield Planned("dense", DispatcherCase(R=ranks, E=4 * ranks, k=2, T=tokens, dtype=dtype, seed=seed + i))


def _large(ranks: int, seed: int) -> Iterator[Planned]:
    for i, (tokens, experts, top_k) in enumerate(LARGE):
        counts = [tokens, 3, 0, 257, *[1] * max(0, ranks - 4)][:ranks]
        counts = counts[i % ranks :] + counts[: i % ranks]
        case = DispatcherCase(
            R=ranks, E=experts, k=top_k, T="+".join(map(str, counts)), H=8, owner=("cyclic", "block")[i // 2],
            ids=("plain", "masked")[i % 2], dtype=DTYPES[i % len(DTYPES)], seed=seed + i,
        )  # fmt: skip
        yield Planned("dense", case)


def _unusual(ranks: int, seed: int) -> Iterator[Planned]:
    """Operands that do not lie one row behind the other, which may be refused, and more columns than a block takes."""
    counts = _token_counts(ranks)
    for i, (operand, layout) in enumerate(itertools.product(OPERANDS, LAYOUTS)):
        tokens = "+".join(map(str, (counts[5], counts[0])[i % 2]))
        case = DispatcherCase(
            R=ranks, E=(7, 4)[i % 2], k=(3, 1)[i // 4 % 2], T=tokens, owner=("cyclic", "block")[i % 2],
            ids=("plain", "masked")[i // 2 % 2], layout=f"{operand}:{layout}", dtype=DTYPES[i % len(DTYPES)],
            optional=True, seed=seed + i,
        )  # fmt: skip
        yield Planned("dense", case)
    for i, columns in enumerate((65, 1025, 2048, 4097)):
        tokens = "+".join(map(str, (counts[0], counts[5])[i % 2]))
        case = DispatcherCase(
            R=ranks, E=2 * ranks, k=2, T=tokens, H=columns, dtype=DTYPES[i % len(DTYPES)], seed=seed + 100 + i
        )
        yield Planned("dense", case)


# (E, copies, k): one expert alone, fewer and more copies than experts, a released size
REDUNDANT = ((1, 3, 1), (2, 2, 1), (3, 4, 2), (8, 8, 2), (5, 1, 5), (7, 9, 3), (60, 4, 4), (128, 32, 8))


def _redundant(ranks: int, seed: int) -> Iterator[Planned]:
    counts = [*_token_counts(ranks), [9] * ranks]
    for i in range(3 * len(REDUNDANT)):
        experts, copies, top_k = REDUNDANT[i % len(REDUNDANT)]
        case = DispatcherCase(
            R=ranks, E=experts, k=top_k, T="+".join(map(str, counts[i % len(counts)])), H=(16, 8, 33)[i % 3],
            owner=OWNERS[(i + i // len(OWNERS)) % len(OWNERS)], ids=ROUTINGS[i // 2 % len(ROUTINGS)], copies=copies,
            dtype=DTYPES[i % len(DTYPES)], seed=seed + i,
        )  # fmt: skip
        yield Planned("live" if i % 4 == 3 else "dense", case)


def _over_two_axes(ranks: int, seed: int) -> Iterator[Planned]:
    if ranks % 2:
        return
    counts = _token_counts(ranks // 2)
    for i in range(2 * len(ROUTINGS)):
        experts, top_k = ((4, 2), (7, 3), (16, 8))[i % 3]
        case = DispatcherCase(
            R=ranks, E=experts, k=top_k, T="+".join(map(str, counts[i % len(counts)])), H=(16, 8)[i % 2], groups=2,
            owner=OWNERS[i % len(OWNERS)], ids=ROUTINGS[i % len(ROUTINGS)], dtype=DTYPES[i % len(DTYPES)],
            seed=seed + i,
        )  # fmt: skip
        yield Planned("live" if i % 4 == 3 else "dense", case)


def _equal_blocks(ranks: int, seed: int) -> Iterator[Planned]:
    """Every rank holds the next E / R experts, with each routing, numbers of tokens and dtype."""
    counts = _token_counts(ranks)
    for i in range(len(ROUTINGS) * len(BLOCKS)):
        each, top_k = BLOCKS[i % len(BLOCKS)]
        case = DispatcherCase(
            R=ranks, E=ranks * each, k=min(top_k, ranks * each), T="+".join(map(str, counts[i % len(counts)])),
            H=(8, 16, 33)[i % 3], ids=ROUTINGS[i % len(ROUTINGS)], dtype=DTYPES[i // 2 % len(DTYPES)], seed=seed + i,
        )  # fmt: skip
        yield Planned("live" if i % 4 == 3 else "dense", case)


def draw(rng: random.Random, worlds: Sequence[int], *, copies: bool = False) -> DispatcherCase:
    """A random case, for counting false alarms without Hypothesis; `copies`: redundant experts too."""
    ranks, experts = rng.choice(list(worlds)), rng.choice([1, 2, 3, 5, 8, 13])
    groups = rng.choice([1, 1, 2]) if ranks % 2 == 0 else 1
    return DispatcherCase(
        R=ranks,
        E=experts,
        k=rng.randint(1, min(experts, 6)),
        T="+".join(str(rng.choice([0, 0, 1, 2, 3, 7, 65])) for _ in range(ranks // groups)),
        groups=groups,
        copies=rng.choice([0, 0, 1, 3, 9]) if copies else 0,
        H=rng.choice([8, 16]),
        owner=rng.choice(OWNERS),
        ids=rng.choice(ROUTINGS),
        dtype=rng.choice(DTYPES),
        seed=rng.randrange(10**6),
    )
