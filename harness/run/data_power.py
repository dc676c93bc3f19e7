"""The power of a data set: which standard wrong outputs the judge would accept on it.

Before a data set judges anything, the mistakes of `harness.core.stage` have to be rejected on it.  They are
made for `ROWS` of its rows and compared with the bound that the judgement needs anyway; only where one of them passes
are more rows looked at, with every statistic of the judge.  A data set that cannot tell them apart is
replaced by one that can:
the same recipe with another seed, then the stage's ordinary data of the same shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.invocation import PART, Trial
from moe_harness.harness.core.stage import ALL, Declared, find_stage

ROWS, MORE_ROWS = 3, 32  # looked at first, and before a data set is called powerless
SEEDS = 3  # tried of a recipe before it is given up
STEP = 50_021  # between these seeds: prime, so that no planned seed is met

# The checks whose verdict is a comparison with the reference; the others compare an implementation with itself.
JUDGING = frozenset(
    ("contract", "exact", "numeric", "routing", "property", "sentinels", "layouts", "special", "memory", "graph_replay",
     "side_stream", "large_offsets")
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """A data set that may judge, or none: `case` is None where no data with power were found."""

    case: Case | None
    rejected: int = 0  # wrong outputs that were rejected on it; 0 where none applies to the case
    accepted: list[str] = field(default_factory=list)  # what the planned data would have accepted


def prove(trial: Trial, case: Case) -> Proof:
    """Find data for a case that reject every wrong output: the planned ones, or what takes their place.

    The call it was proved on is the one that `trial.build` returns next.
    """
    first: list[str] | None = None
    if case.data in ("exact", "partial_sums", "deep_sums") and not trial.stage.one_result(case, trial.subject.declared):
        case = case.but(data="normal")  # ordinary data of the shape tell more
    for candidate in _candidates(case):
        call = trial.prepare(candidate)
        names, tried = accepted(call, trial.subject.declared.rounds)
        first = names if first is None else first
        if not names:
            return Proof(candidate, tried, first)
    return Proof(None, 0, first or [])


def _candidates(case: Case) -> Iterator[Case]:
    yield case
    for recipe in dict.fromkeys((case.data, "normal")):
        for turn in range(1, SEEDS + 1):
            yield case.but(data=recipe, seed=case.seed + turn * STEP)


def accepted(call: Call, declared: Declared = None) -> tuple[list[str], int]:
    """(names of the wrong outputs that pass the judge's comparison without an excuse, how many were tried)."""
    stage = find_stage(call.case.stage)
    if stage.count(call) > PART:
        call = stage.spread(call, torch.arange(stage.count(call)), PART)
    if call.truth is None:
        call.truth = stage.truth(call, declared)
    rows = stage.telling_rows(call)
    sample = stage.spread(call, rows, ROWS)
    wrong = stage.wrong_outputs(sample)
    tried = len(wrong)
    passing = [name for name in stage.passing(sample, wrong, declared) if not excused(call.case, name)]
    if passing:
        if len(rows) > ROWS:
            sample = stage.spread(call, rows, MORE_ROWS)
            wrong = stage.wrong_outputs(sample)
        passing = [name for name in passing if name in wrong and not stage.rejects(sample, wrong[name], declared)]
    return passing, tried


def excused(case: Case, name: str) -> str | None:
    """Why no data of this kind can reject a wrong output; None where they should."""
    for excuse in find_stage(case.stage).excuses():
        if excuse.wrong in (ALL, name) and excuse.holds(case):
            return excuse.why
    return None
