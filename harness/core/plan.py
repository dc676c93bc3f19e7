"""The plan of a run: what is asked for, and which checks judge which cases of a stage.

The helpers by which a stage answers are here too: profiles, dtypes, models, covering arrays.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any, NamedTuple

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.registry import needed_part

PROFILES = ("quick", "full", "exhaustive")
EXAMPLES = {"quick": 200, "full": 500, "exhaustive": 3000}  # cases that the search for a failure draws
DRAWN_OVER_RANKS = EXAMPLES | {"quick": 60}  # where a case is a run of several processes
WEIGHT_BYTES_ON_CPU = 1 << 30


@dataclass(frozen=True)
class Request:
    """One run: profile, device, dtypes, the models whose shapes are added, and the seed."""

    profile: str = "quick"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    configs: tuple[Any, ...] = ()  # fixtures.configs.ModelShape
    seed: int = 0

    def pick(self, quick: Any, full: Any) -> Any:
        """The quick profile's value or that of the longer ones."""
        return quick if self.profile == "quick" else full

    def dtypes_of(self, data: str) -> tuple[str, ...]:
        """The dtypes in which this kind of data exists."""
        return tuple(dtype for dtype in self.dtypes if (data, dtype) != ("outside_fp16", "fp16"))

    def narrow(self) -> tuple[str, ...]:
        """The dtypes of 16 bits."""
        return tuple(dtype for dtype in self.dtypes if dtype in ("fp16", "bf16"))

    def shuffled(self, values: Iterable[int]) -> Iterator[int]:
        """`values` in a seeded order, over and over."""
        order = list(values)
        Random(self.seed).shuffle(order)
        while True:
            yield from order

    def map_for(self, shape: Any) -> str:
        """How a model's experts are held: all of them, or one rank's part where all of them exceed the memory."""
        size = 4 if self.dtypes[-1] == "fp32" else 2
        weights = 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size * size
        if self.device == "cuda":
            return "none" if weights < (24 << 30) else "rank8"
        return "none" if weights < WEIGHT_BYTES_ON_CPU else "rank8" if weights < 8 * WEIGHT_BYTES_ON_CPU else "rank32"


CANDIDATES = 16  # random completions tried for each uncovered pair; more buys few rows (8: +9 %, 64: -3 %)


def pairwise(
    axes: Mapping[str, Sequence[Any]], seed: int = 0, allowed: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Rows (axis -> value) covering every pair that `allowed` permits; the same seed gives the same rows."""
    rng = Random(seed)
    names = list(axes)
    values = {name: range(len(axes[name])) for name in names}
    pairs = [((a, va), (b, vb)) for a, b in combinations(names, 2) for va in values[a] for vb in values[b]]
    missing = set(pairs)
    rng.shuffle(pairs)
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        if pair not in missing:
            continue
        best, covered = None, set[Any]()
        for _ in range(CANDIDATES):
            picks = {name: rng.randrange(len(values)) for name, values in axes.items()} | dict(pair)
            if not allowed({name: axes[name][i] for name, i in picks.items()}):
                continue
            new = missing & set(combinations(picks.items(), 2))
            if len(new) > len(covered):
                best, covered = picks, new
        if best is not None:
            missing -= covered
            rows.append({name: axes[name][i] for name, i in best.items()})
    return rows


ON_CUDA_ONLY = {"graph_replay", "side_stream", "large_offsets"}
NEEDS_CUDA = "needs --device cuda"  # why these are skipped elsewhere


class Planned(NamedTuple):
    """One unit of work: a check on a case."""

    check: str
    case: Case

    @property
    def id(self) -> str:
        return f"{self.case.stage}/{self.check}/{self.case.id()}"


def on_cuda(small: Iterable[Case], large: Iterable[Case] = ()) -> dict[str, Iterable[Case]]:
    """The checks of a GPU by name: of small cases in a graph or on a stream of their own, of large ones the offsets."""
    found: dict[str, Iterable[Case]] = dict.fromkeys(("graph_replay", "side_stream"), list(small))
    return found | ({"large_offsets": large} if large else {})


def plan(stage: str, request: Request) -> list[Planned]:
    """Every (check, case) of a run, in the order of judgement; equal ones appear once."""
    by_check = needed_part(stage, "cases").plan(request)
    found = [Planned(check, case) for check, cases in by_check.items() for case in numbered(cases, request)]
    return list(dict.fromkeys(found))


def numbered(cases: Iterable[Case], request: Request) -> list[Case]:
    """Seed each case by its place, and for the exhaustive profile repeat all of them with other seeds.

    A case that names no dtype, or one that is not asked for, is judged in the first that is.
    """
    cases = [c if c.dtype in request.dtypes else c.but(dtype=request.dtypes[0]) for c in cases]
    rounds = 5 if request.profile == "exhaustive" else 1
    base = request.seed * 100_003
    return [c.but(seed=base + r * 10_007 + i) for r in range(rounds) for i, c in enumerate(cases)]
