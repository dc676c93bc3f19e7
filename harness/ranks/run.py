"""A run over many ranks: `moe-harness check --stage dispatcher --ranks 1,2,3,4`, with the result every run has."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from moe_harness.harness.core.case import Case, parse_id
from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.core.findings import Answer, Loaded
from moe_harness.harness.core.folders import needed_part
from moe_harness.harness.core.names import PLAIN
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_cases import DTYPES
from moe_harness.harness.core.ranked_stage import find_ranked
from moe_harness.harness.core.request import OVER_RANKS, Request
from moe_harness.harness.process.pool import EXPLAINED
from moe_harness.harness.ranks import pool
from moe_harness.harness.ranks.judge import Verdict, judge, planned, traits_of
from moe_harness.harness.report import Result
from moe_harness.harness.run.result_builder import Listener
from moe_harness.harness.run.session import RunOptions, Session

ENOUGH = 10  # cases that ended the ranks' processes; each costs new ones, and the verdict stands
ENOUGH_SPENT = 3  # cases that used up their budget
SPENT = ("hang", "timeout", "stopped")  # kinds of failure that did
SEARCH_SECONDS = 30.0
SHORTER = 4  # how many times shorter the budget is after one


class RankRun(Session):
    """One dispatcher or sharded layer over several world sizes."""

    def __init__(
        self, stage: str, spec: str, request: Request, options: RunOptions, listener: Any, worlds: tuple[int, ...],
        keep: Callable[[Result], None],
    ):  # fmt: skip
        super().__init__(stage, spec, request, options, listener, find_ranked(stage).checks)
        self.keep, self.worlds, self.backend = keep, worlds, "nccl" if request.device == "cuda" else "gloo"
        self.left: Counter[str] = Counter()  # cases of each check that are planned and not judged yet
        self.broken: Counter[str] = Counter()  # kinds of failure that ended the ranks' processes
        self.told: set[str] = set()

    def judge(self) -> Result:
        """Every planned case, then Hypothesis; the pool of ranks is rebuilt after whatever breaks it.

        Raises:
            UsageError, CannotJudge: the implementation cannot be found or imported.
        """
        from moe_harness.harness.process.versions import versions

        self.account.loaded = Loaded(versions=versions())
        ids = self._planned_ids()
        self.account.expect(ids)
        examples = OVER_RANKS[self.request.profile] if self._searches() else 0
        self.left = Counter(parse_id(case_id)[1] for case_id in ids)
        self.left += Counter({"property": examples})
        self.listener.start(self.spec, dict(self.left))
        self._keep_unfinished()
        try:
            self._judge_all(ids, examples)
        except KeyboardInterrupt:
            self.account.interrupt()
        except CannotJudge as error:  # what was judged until then is known all the same
            if not self.account.executed and not self.account.refused:
                raise
            self.account.error = str(error)
        for left in pool.close_all():
            self._tell_left(left)
        return self.result()

    def _judge_all(self, ids: list[str], examples: int) -> None:
        for case_id in ids:
            self._judge_one(case_id)
            self.left[parse_id(case_id)[1]] -= 1
            self._keep_unfinished()
            if self.options.fail_fast and self.account.failures:
                self._name_causes()
                return
            if self._is_enough():
                self.listener.note(f"stopped: {self.broken.total()} cases have ended the ranks' processes")
                return
        if examples:
            self._draw(examples)
            del self.left["property"]  # the search may end early; what it has to do is not a number of cases
        self._name_causes()

    def _is_enough(self) -> bool:
        return self.broken.total() >= ENOUGH or self._spent() >= ENOUGH_SPENT

    def _spent(self) -> int:
        return sum(self.broken[kind] for kind in SPENT)

    def _budget(self) -> float:
        """Seconds for a case: all that was asked for, until one has used them up."""
        return self.options.timeout / (SHORTER if self._spent() else 1)

    def _searches(self) -> bool:
        return super()._searches() and find_ranked(self.stage).searches

    def result(self, *, final: bool = True) -> Result:
        """What is known by now; a planned case that was not judged keeps it from passing."""
        result = self.account.result(final=final)
        for check, cases_left in (+self.left).items():
            result["coverage"]["skipped"].append({"what": check, "reason": "not judged", "cases": cases_left})
        if result["verdict"] == "pass" and +self.left:
            result["verdict"] = "error"
        judged = {_together(case) for case in self.account.executed if case.core() and case.rows()}
        missing = [str(ranks) for ranks in self.worlds if ranks not in judged]
        if result["verdict"] in ("pass", "unsupported") and judged and missing and self.options.cases is None:
            result["verdict"] = "unsupported"
            told = f"no case was judged over {', '.join(missing)} ranks, all were refused"
            result["observations"].append({"name": "worlds", "text": told})
        return result

    def _keep_unfinished(self) -> None:
        """Hand over what is known, marked as cut short: it stands if nothing comes after it."""
        self.keep({**self.result(final=False), "interrupted": True})

    def _planned_ids(self) -> list[str]:
        if self.options.cases is not None:
            return list(self.options.cases)
        profile, seed = self.request.profile, self.request.seed
        ids = planned(self.stage, self.spec, self.worlds, profile=profile, seed=seed, backend=self.backend)
        wanted = self.options.dtypes or DTYPES
        parsed = [(case_id, *parse_id(case_id)[1:]) for case_id in ids]
        return [case_id for case_id, check, case in parsed if case.dtype in wanted and self._wants(check)]

    def _judge_one(self, case_id: str) -> Verdict:
        verdict = judge(self.spec, case_id, backend=self.backend, budget=self._budget())
        if verdict.failure is not None:
            self.broken[verdict.failure.kind] += 1
        for left in verdict.left:
            self._tell_left(left)
        self.account.take(verdict.answer())
        return verdict

    def _tell_left(self, left: str) -> None:
        """A process that an implementation has left behind, once for each command line."""
        command = left.partition(": ")[2]
        if command not in self.told:
            self.told.add(command)
            self.account.heard["", "left running"][f"{left} (a process that the implementation started; ended)"] += 1

    def _name_causes(self) -> None:
        """Put the fault that explains it before what the rows say of the first failure of each check."""
        from moe_harness.harness.diagnosis.ranked import named

        first = {failure["check"]: failure for failure in reversed(self.account.failures)}
        for failure in sorted(first.values(), key=self.account.place)[:EXPLAINED]:
            if any(entry["fault"] in PLAIN for entry in failure["diagnosis"]):
                continue
            failure["diagnosis"] = named(self.spec, failure["case"], backend=self.backend) + failure["diagnosis"]

    def _draw(self, examples: int) -> None:
        check = find_ranked(self.stage).checks[0]
        traits = traits_of(self.stage, self.spec, self.backend)

        def ask(case: Case) -> Answer:
            verdict = judge(self.spec, Planned(check, case).id, backend=self.backend, budget=self._budget())
            return verdict.answer(counts_as="property")

        drawn = needed_part(self.stage, "strategy").cases(self.worlds, **traits)
        self._search(drawn, ask, examples=examples, seconds=SEARCH_SECONDS)


def _together(case: Any) -> int:
    """How many ranks work together in a case."""
    return case.R // getattr(case, "groups", 1)


def judge_ranks(
    stage: str,
    spec: str,
    request: Request,
    options: RunOptions,
    worlds: tuple[int, ...],
    listener: Any,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Judge one implementation of a stage that runs on many ranks; `keep` hears after every case what is known."""
    return RankRun(stage, spec, request, options, listener or Listener(), worlds, keep).judge()
