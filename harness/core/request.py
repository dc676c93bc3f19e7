"""What the caller asks for, and the helpers by which a plan answers: profiles, dtypes, models, seeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from moe_harness.harness.core.case import Case

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

    def shuffled(self, values: Iterable[int]) -> Iterator[int]:
        """`values` in a seeded order, over and over."""
        order = list(values)
        Random(self.seed).shuffle(order)
        while True:
            yield from order

    def numbered(self, cases: Iterable[Case]) -> list[Case]:
        """Seed each case by its place, and for the exhaustive profile repeat all of them with other seeds.

        A case that names no dtype, or one that is not asked for, is judged in the first that is.
        """
        cases = [c if c.dtype in self.dtypes else c.but(dtype=self.dtypes[0]) for c in cases]
        rounds = 5 if self.profile == "exhaustive" else 1
        base = self.seed * 100_003
        return [c.but(seed=base + r * 10_007 + i) for r in range(rounds) for i, c in enumerate(cases)]

    def on_cuda(self, cases: Mapping[str, Sequence[Case]]) -> dict[str, list[Case]]:
        return {check: self.numbered(group) for check, group in cases.items()}

    def model_shapes(self) -> tuple[Any, ...]:
        return self.configs

    def map_for(self, shape: Any) -> str:
        """How a model's experts are held: all of them, or one rank's part where all of them exceed the memory."""
        size = 4 if self.dtypes[-1] == "fp32" else 2
        weights = 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size * size
        if self.device == "cuda":
            return "none" if weights < (24 << 30) else "rank8"
        return "none" if weights < WEIGHT_BYTES_ON_CPU else "rank8" if weights < 8 * WEIGHT_BYTES_ON_CPU else "rank32"
