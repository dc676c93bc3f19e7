"""What the harness asks of a stage whose implementations run on many ranks; no torch.

Such a stage is a folder of harness/stages with four modules, the first three of which import no torch:

    ranked.py       RANKED, a `RankedStage`: how an implementation is called, and what a finding may be about
    cases.py        its cases, and `plan(worlds, profile=, seed=, **traits)`
    strategy.py     `cases(worlds, **traits)`, drawn at random
    rank_task.py    `run(me, spec, seed)`, what one rank does for a case; `traits(me, spec, seed)`, where the plan
                    depends on the implementation
"""

from dataclasses import dataclass

from moe_harness.harness.core.contracts import RANK_STAGES
from moe_harness.harness.core.folders import needed_part


@dataclass(frozen=True)
class RankedStage:
    """One stage over many ranks."""

    made_from: tuple[str, ...]  # what an implementation is called with, positionally
    named: tuple[str, ...]  # and by name
    checks: tuple[str, ...]  # those that cases are planned for; a wrong value is a finding of the first
    further: tuple[str, ...]  # what else a finding may be about
    is_function: bool = False  # otherwise a class, one object of it on each rank
    has_traits: bool = False  # whether the plan depends on what an implementation says of itself

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


def rank_checks() -> tuple[str, ...]:
    """What findings over many ranks may be about: first the verdict on the values of each stage."""
    stages = [find_ranked(stage) for stage in RANK_STAGES]
    names = [stage.checks[0] for stage in stages] + [name for stage in stages for name in stage.further]
    return tuple(dict.fromkeys(names))
