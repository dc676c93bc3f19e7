"""Where a run over many ranks judges: `moe-harness check --stage dispatcher --ranks 1,2,3,4`."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import OVER_RANKS, check_stage
from moe_harness.harness.core.findings import Answer, Explanation, Loaded
from moe_harness.harness.core.plan import DRAWN_OVER_RANKS, PROFILES, Planned, Request
from moe_harness.harness.core.ranked_stage import find_ranked, plan_over_ranks
from moe_harness.harness.core.registry import needed_part
from moe_harness.harness.process.pool import Backend
from moe_harness.harness.ranks import pool
from moe_harness.harness.ranks.judge import Verdict, judge, traits_of

ENOUGH = 10  # cases that ended the ranks' processes; each costs new ones, and the verdict stands
ENOUGH_SPENT = 3  # cases that used up their budget
SPENT = ("hang", "timeout", "stopped")  # kinds of failure that did
SHORTER = 4  # how many times shorter the budget is after one


class OverRanks(Backend):
    """The worlds of a run; the pool of ranks is rebuilt after whatever breaks it.

    Nothing of one case is left for the next but the processes, which a failure ends: none is judged alone again.
    """

    search_seconds = dict.fromkeys(PROFILES, 30.0)

    def __init__(self, stage: str, spec: str, device: str, worlds: tuple[int, ...], budget: float):
        self.stage, self.spec, self.worlds, self.budget = check_stage(stage, OVER_RANKS), spec, worlds, budget
        asked = find_ranked(stage)
        self.checks, self.examples = asked.checks, DRAWN_OVER_RANKS if asked.searches else {}
        self.kind = "nccl" if device == "cuda" else "gloo"
        self.broken: dict[str, str] = {}  # cases that ended the ranks' processes, and how
        self.left: dict[str, str] = {}  # command line of what was left running -> what is told of it, until it is

    def __exit__(self, *_: object) -> None:
        self._hear(pool.close_all())

    def start(self) -> Loaded:
        """Each rank loads the implementation with its first case."""
        from moe_harness.harness.core.environment import versions

        return Loaded(versions=versions())

    @cached_property
    def traits(self) -> dict[str, Any]:
        """What the plan has to know of the implementation."""
        return traits_of(self.stage, self.spec, self.kind)

    def plan(self, request: Request) -> Iterable[Planned]:
        return plan_over_ranks(self.stage, self.worlds, profile=request.profile, seed=request.seed, **self.traits)

    def judge(self, case_ids: Iterable[str]) -> Iterator[Answer]:
        for case_id in case_ids:
            yield self._verdict(case_id).answer()
            if self.spent() is not None:
                return

    def spent(self) -> str | None:
        if len(self.broken) >= ENOUGH or self._out_of_time() >= ENOUGH_SPENT:
            return f"{len(self.broken)} cases have ended the ranks' processes"
        return None

    def drawn(self, dtypes: tuple[str, ...]) -> Any:
        return needed_part(self.stage, "strategy").cases(self.worlds, **self.traits)

    def ask_drawn(self, case: Case) -> Answer:
        drawn = judge(self.spec, Planned(self.checks[0], case).id, backend=self.kind, budget=self._budget())
        return drawn.answer(counts_as="property")

    def explain(self, case_id: str) -> Explanation | None:
        """The faults of the same results; a case that ended the processes has told its own."""
        from moe_harness.harness.diagnosis.ranked import named

        if case_id in self.broken:
            return None
        return Explanation(named(self.spec, case_id, backend=self.kind), known=None)

    def left_running(self) -> list[str]:
        new = [told for told in self.left.values() if told]
        self.left = dict.fromkeys(self.left, "")
        return new

    def _verdict(self, case_id: str) -> Verdict:
        verdict = judge(self.spec, case_id, backend=self.kind, budget=self._budget())
        if verdict.failure is not None:
            self.broken[case_id] = verdict.failure.kind
            self.deaths = len(self.broken)
        self._hear(verdict.left)
        return verdict

    def _hear(self, left: Iterable[str]) -> None:
        """A process that an implementation has left behind counts once for each command line."""
        for told in left:
            self.left.setdefault(told.partition(": ")[2], told)

    def _out_of_time(self) -> int:
        return sum(kind in SPENT for kind in self.broken.values())

    def _budget(self) -> float:
        """Seconds for a case: all that was asked for, until one has used them up."""
        return self.budget / (SHORTER if self._out_of_time() else 1)
