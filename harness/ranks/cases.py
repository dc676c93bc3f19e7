"""Cases of the stages that run on many ranks: frozen specs with ids that replay, the planned list, no torch.

dispatcher/dense/R=2,E=3,k=1,T=0+2              tokens of rank 0 and rank 1; fields at their default left out
parallel_linear/shard/R=2,kind=row,E=3,K=8,N=6,S=3+0+2
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from moe_harness.harness.core import case as spec_module
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.errors import UsageError, unknown

OWNERS = ("block", "cyclic", "random", "last_empty", "one")
ROUTINGS = ("plain", "masked", "duplicates", "hot", "none", "nan")
STATES = ("partial", "replicated", "complete")
KINDS = ("replicated", "column", "merged_column", "row")
DTYPES = ("fp32", "bf16", "fp16")


def numbers(text: str) -> list[int]:
    """ "0+2" -> [0, 2]; what a case says once per rank or per expert."""
    try:
        return [int(part) for part in text.split("+")]
    except ValueError:
        raise UsageError(f"{text!r} should be whole numbers joined by '+', such as 0+2") from None


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown(name, value, list(known))


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
        _one_of("owner", self.owner, OWNERS)
        _one_of("ids", self.ids, ROUTINGS)
        _one_of("dtype", self.dtype, DTYPES)
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


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A layer of `kind` over R ranks: E experts, K in, N out per weight, S rows of each expert."""

    stage: ClassVar[str] = "parallel_linear"
    R: int
    E: int
    K: int
    N: int
    S: str
    kind: str

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("dtype", self.dtype, DTYPES)
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

    def rows(self) -> int:
        return sum(self.group_sizes)


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
        _one_of("routed", self.routed, STATES)
        _one_of("shared", self.shared, (*STATES, "none"))
        _one_of("dtype", self.dtype, DTYPES)
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


CASES: dict[str, type[Case]] = {kind.stage: kind for kind in (DispatcherCase, LinearCase, ReductionCase)}
CHECKS = {"dispatcher": ("dense", "live"), "parallel_linear": ("shard",), "reduction": ("reduction",)}


def case_id(check: str, case: Case) -> str:
    """stage/check/fields: what `parse_id` takes back."""
    return f"{case.stage}/{check}/{case.id()}"


def parse_id(text: str) -> tuple[str, Case]:
    """(check, case) of an id; UsageError tells what does not fit."""
    stage, check, values = (text.strip().split("/", 2) + ["", ""])[:3]
    if stage not in CASES:
        raise unknown("stage", stage, list(CASES))
    _one_of("check", check, CHECKS[stage])
    types = {f.name: f.type for f in fields(CASES[stage])}
    given: dict[str, Any] = {}
    for item in filter(None, values.split(",")):
        name, _, value = item.partition("=")
        if name not in types:
            raise UsageError(f"in the case {text!r}: {unknown('field', name, list(types))}")
        given[name] = spec_module._value(name, value, types[name])
    try:
        return check, CASES[stage](**given)
    except TypeError as error:
        raise UsageError(f"the case {text!r} is incomplete: {error}") from None


# The planned list -----------------------------------------------------------------------------------------------

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


def dispatcher_cases(
    worlds: Sequence[int], *, profile: str = "quick", seed: int = 0, copies: bool = False
) -> Iterator[tuple[str, DispatcherCase]]:
    """(check, case) in a fixed order; every pair of axis values occurs, in "full" with three seeds.

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
            yield ("live" if i % 5 == 4 else "dense"), case
        yield from _large(ranks, seed + repeat * 1000 + 200)
        yield from _equal_blocks(ranks, seed + repeat * 1000 + 300)
        yield from _over_two_axes(ranks, seed + repeat * 1000 + 400)
        if copies:
            yield from _redundant(ranks, seed + repeat * 1000 + 500)


def _large(ranks: int, seed: int) -> Iterator[tuple[str, DispatcherCase]]:
    for i, (tokens, experts, top_k) in enumerate(LARGE):
        counts = [tokens, 3, 0, 257, *[1] * max(0, ranks - 4)][:ranks]
        counts = counts[i % ranks :] + counts[: i % ranks]
        case = DispatcherCase(
            R=ranks, E=experts, k=top_k, T="+".join(map(str, counts)), H=8, owner=("cyclic", "block")[i // 2],
            ids=("plain", "masked")[i % 2], dtype=DTYPES[i % len(DTYPES)], seed=seed + i,
        )  # fmt: skip
        yield "dense", case


# (E, copies, k): one expert alone, fewer and more copies than experts, a released size
REDUNDANT = ((1, 3, 1), (2, 2, 1), (3, 4, 2), (8, 8, 2), (5, 1, 5), (7, 9, 3), (60, 4, 4), (128, 32, 8))


def _redundant(ranks: int, seed: int) -> Iterator[tuple[str, DispatcherCase]]:
    counts = [*_token_counts(ranks), [9] * ranks]
    for i in range(3 * len(REDUNDANT)):
        experts, copies, top_k = REDUNDANT[i % len(REDUNDANT)]
        case = DispatcherCase(
            R=ranks, E=experts, k=top_k, T="+".join(map(str, counts[i % len(counts)])), H=(16, 8, 33)[i % 3],
            owner=OWNERS[(i + i // len(OWNERS)) % len(OWNERS)], ids=ROUTINGS[i // 2 % len(ROUTINGS)], copies=copies,
            dtype=DTYPES[i % len(DTYPES)], seed=seed + i,
        )  # fmt: skip
        yield ("live" if i % 4 == 3 else "dense"), case


def _over_two_axes(ranks: int, seed: int) -> Iterator[tuple[str, DispatcherCase]]:
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
        yield ("live" if i % 4 == 3 else "dense"), case


def _equal_blocks(ranks: int, seed: int) -> Iterator[tuple[str, DispatcherCase]]:
    """Every rank holds the next E / R experts, with each routing, numbers of tokens and dtype."""
    counts = _token_counts(ranks)
    for i in range(len(ROUTINGS) * len(BLOCKS)):
        each, top_k = BLOCKS[i % len(BLOCKS)]
        case = DispatcherCase(
            R=ranks, E=ranks * each, k=min(top_k, ranks * each), T="+".join(map(str, counts[i % len(counts)])),
            H=(8, 16, 33)[i % 3], ids=ROUTINGS[i % len(ROUTINGS)], dtype=DTYPES[i // 2 % len(DTYPES)], seed=seed + i,
        )  # fmt: skip
        yield ("live" if i % 4 == 3 else "dense"), case


def linear_cases(
    worlds: Sequence[int], kind: str, *, profile: str = "quick", seed: int = 0
) -> Iterator[tuple[str, LinearCase]]:
    """(check, case): square and tall weights, empty experts, no rows at all; sizes that the ranks share evenly."""
    rows = ("3+0+2", "0+0+0", "1+1+1", "0+0+9", "17+4+0")
    for ranks, repeat in itertools.product(worlds, range(1 if profile == "quick" else 3)):
        for i, (inner, outer) in enumerate(((1, 1), (2, 1), (1, 2), (3, 2), (4, 4))):
            dtype, number = DTYPES[i % len(DTYPES)], seed + repeat * 1000 + i
            size: dict[str, Any] = {"K": 4 * inner * ranks, "N": 4 * outer * ranks, "S": rows[i], "E": 3}
            yield "shard", LinearCase(R=ranks, kind=kind, dtype=dtype, seed=number, **size)
        for case in (*_large_layers(ranks, kind), *_uneven_layers(ranks, kind)):
            yield "shard", case.but(seed=seed + repeat * 1000 + case.seed)


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


def _shared_by(ranks: int, size: int) -> int:
    return -(-size // ranks) * ranks


# (routed, shared) of every legal sum; with sequence parallel rows the last two hold parts of unequal height
SUMS = (
    *(("partial", shared) for shared in ("none", "partial", "replicated")),
    *(("replicated", shared) for shared in ("none", "partial", "replicated")),
    *(("complete", shared) for shared in ("none", "complete", "partial", "replicated")),
)


def reduction_cases(
    worlds: Sequence[int], *, profile: str = "quick", seed: int = 0
) -> Iterator[tuple[str, ReductionCase]]:
    """(check, case): every sum of states, with and without sequence parallel rows, on even, ragged and no rows, over
    all ranks and over each half of them."""
    for ranks, repeat in itertools.product(worlds, range(1 if profile == "quick" else 3)):
        for groups in (1, 2) if ranks % 2 == 0 else (1,):
            for i, ((routed, shared), sequence, counts) in enumerate(
                itertools.product(SUMS, (False, True), _rows_of(ranks // groups))
            ):
                yield "reduction", ReductionCase(
                    R=ranks, T="+".join(map(str, counts)), H=(16, 8, 33)[i % 3], routed=routed, shared=shared,
                    sequence=sequence, groups=groups, dtype=DTYPES[i % len(DTYPES)], seed=seed + repeat * 1000 + i,
                    optional=sequence and routed == "complete" and shared in ("partial", "replicated"),
                )  # fmt: skip


def _rows_of(members: int) -> list[list[int]]:
    return [[3] * members, [2, 0, 5, 1, 4, 0, 7, 1][:members], [0] * members, [*[1] * (members - 1), 257]]


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
