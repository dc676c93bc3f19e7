"""What the harness asks of a stage whose implementations run on many ranks; no torch.

Such a stage is a folder of harness/stages with four modules, the first three of which import no torch:

    ranked.py       RANKED, a `RankedStage`: how an implementation is called, and what a finding may be about
    cases.py        its cases, and `plan(worlds, profile=, seed=, **traits)`
    strategy.py     `cases(worlds, **traits)`, drawn at random
    rank_task.py    `run(me, spec, seed)`, what one rank does for a case; `traits(me, spec, seed)`, where the plan
                    depends on the implementation

A stage of one device may be judged over ranks too: beside its other modules it has `ranked.py`, `rank_task.py` and in
`cases.py` a `plan_over_ranks`.  The name of the check tells its cases over ranks from the others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_harness.harness.core.contracts import OVER_RANKS, RANK_STAGES
from moe_harness.harness.core.findings import Finding
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.registry import needed_part

Reports = Sequence[dict[str, Any]]  # what each rank observed


@dataclass(frozen=True)
class RankedStage:
    """One stage over many ranks."""

    made_from: tuple[str, ...]  # what an implementation is called with, positionally
    named: tuple[str, ...]  # and by name
    checks: tuple[str, ...]  # those that cases are planned for; a wrong value is a finding of the first
    further: tuple[str, ...]  # what else a finding may be about
    is_function: bool = False  # otherwise a class, one object of it on each rank
    has_traits: bool = False  # whether the plan depends on what an implementation says of itself
    searches: bool = True  # whether cases are drawn at random too
    across: Callable[[Reports], Iterator[Finding]] | None = None  # findings that no rank can make alone

    @property
    def call(self) -> str:
        """How an implementation is called."""
        return f"({', '.join([*self.made_from, *(f'{name}=...' for name in self.named)])})"

    @property
    def findings(self) -> tuple[str, ...]:
        """Every check that a finding may be of."""
        return (self.checks[0], *self.further)


def find_ranked(stage: str) -> RankedStage:
    """The stage of that name; LookupError where it is none over many ranks."""
    return needed_part(stage, "ranked").RANKED


def is_over_ranks(case_id: str) -> bool:
    """Whether the case of that id, "stage/check/fields", runs on many ranks."""
    stage, check = (case_id.split("/") + [""])[:2]
    return stage in RANK_STAGES or (stage in OVER_RANKS and check in find_ranked(stage).checks)


def plan_over_ranks(stage: str, worlds: Sequence[int], **how: Any) -> Iterable[Planned]:
    """The cases of a stage over these numbers of ranks."""
    cases = needed_part(stage, "cases")
    return getattr(cases, "plan_over_ranks", cases.plan)(worlds, **how)


def rank_checks() -> tuple[str, ...]:
    """What findings over many ranks may be about: first the verdict on the values of each stage."""
    stages = [find_ranked(stage) for stage in RANK_STAGES]
    names = [stage.checks[0] for stage in stages] + [name for stage in stages for name in stage.further]
    return tuple(dict.fromkeys(names))
