"""A run: plan, judge over a backend, search with Hypothesis, confirm failures, and put the result together."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moe_harness.harness.core.case import Case, parse_id
from moe_harness.harness.core.contracts import DTYPES
from moe_harness.harness.core.errors import CannotJudge, HarnessError
from moe_harness.harness.core.findings import Answer, Explanation, Finding
from moe_harness.harness.core.names import PLAIN
from moe_harness.harness.core.plan import Planned, Request
from moe_harness.harness.core.registry import stages_with
from moe_harness.harness.process.pool import EXPLAINED, Backend, Pool, worker_count
from moe_harness.harness.report import Result
from moe_harness.harness.report.results import Failure
from moe_harness.harness.run.result_builder import COUNTED_AS, Listener, ResultBuilder, add_cause

CONFIRMED_PER_CHECK = 2  # failures judged once more, alone in a fresh process
KEPT_EVERY = 1.0  # seconds between what is handed over of an unfinished run

Keep = Callable[[Result], None]


@dataclass
class RunOptions:
    """How to judge, beside what (`Request`)."""

    dtypes: tuple[str, ...] | None = None  # None: those the implementation declares
    timeout: float = 60.0
    checks: tuple[str, ...] | None = None  # None: all of the stage
    cases: tuple[str, ...] | None = None  # None: those of the plan
    fail_fast: bool = False  # end at the first failure, explained

    @property
    def partial(self) -> bool:
        """Whether less than the plan was asked for."""
        return self.checks is not None or self.cases is not None or self.fail_fast


class Session:
    """One implementation under judgement, over a backend; `keep` hears now and then what is known by then."""

    def __init__(
        self, backend: Backend, stage: str, spec: str, request: Request, options: RunOptions, listener: Any,
        keep: Keep | None = None,
    ):  # fmt: skip
        self.backend, self.stage, self.spec, self.options = backend, stage, spec, options
        self.listener, self.keep, self.kept = listener, keep, 0.0
        worlds = () if options.cases is not None else backend.worlds
        self.account = ResultBuilder(
            stage, spec, request, listener, partial=options.partial, checks=backend.checks, worlds=worlds
        )
        self.account.explain = self._explain_at_once
        self.asked: set[str] = set()  # failing cases whose cause was asked for

    @property
    def request(self) -> Request:
        """What is judged; once the implementation is loaded, with the dtypes that it declares."""
        return self.account.request

    def judge(self) -> Result:
        """Do all of it.

        Raises:
            UsageError, CannotJudge: the implementation cannot be loaded; nothing has been judged then.
        """
        try:
            with self.backend:
                self._judge()
        except KeyboardInterrupt:
            self.account.interrupt()
        except CannotJudge as error:  # what was judged until then is known all the same
            if not self.account.executed and not self.account.refused:
                raise
            self.account.error = str(error)
        self._hear_left()
        return self.account.result()

    def _judge(self) -> None:
        self.account.loaded = self.backend.start()
        planned = self._planned()
        examples = self.backend.examples.get(self.request.profile, 0) if self._searches() else 0
        self.account.expect([p.id for p in planned], examples)
        sizes = Counter(p.check for p in planned)
        self.listener.start(self.spec, {**sizes, **({"property": examples} if examples else {})})
        runnable = self._runnable(planned)
        self._keep_unfinished()
        for answer in self.backend.judge(runnable):
            self.account.take(answer)
            self._keep_unfinished()
            if self.options.fail_fast and self.account.failures:
                self.account.leave_out(runnable, "--fail-fast ended the run at the first failure")
                return
            if answer.lacks and not self.account.executed:
                self.account.leave_out(runnable, answer.reason or "")
                return
        if (why := self.backend.spent()) is not None:
            self.listener.note(f"stopped: {why}")
            return
        if examples:
            self._search(examples)
        self._confirm()
        self._check_declared_dtypes()
        self._explain()
        self._describe()

    def _wants(self, check: str) -> bool:
        return self.options.checks is None or check in self.options.checks

    def _searches(self) -> bool:
        return self.options.cases is None and self._wants("property")

    def _keep_unfinished(self) -> None:
        """Hand over what is known, marked as cut short: it stands if nothing comes after it."""
        self._hear_left()
        if self.keep is not None and time.monotonic() - self.kept > KEPT_EVERY:
            self.keep(self.account.result(final=False))
            self.kept = time.monotonic()

    def _hear_left(self) -> None:
        for left in self.backend.left_running():
            told = f"{left} (a process that the implementation started; ended)"
            self.account.heard["", "left running"][told] += 1

    # ------------------------------------------------------------------------------------------------------- the plan

    def _planned(self) -> list[Planned]:
        dtypes = self._dtypes()
        if not dtypes:
            declared = ", ".join(self.account.loaded.dtypes)
            asked = ", ".join(self.options.dtypes or ())
            raise CannotJudge(f"{self.spec!r} declares the dtypes {declared}, but --dtype asks for {asked}")
        self.account.request = replace(self.request, dtypes=dtypes)
        if self.options.cases is not None:
            return [Planned(check, case) for _, check, case in map(parse_id, self.options.cases)]
        return [p for p in self.backend.plan(self.request) if self._wants(p.check) and p.case.dtype in dtypes]

    def _dtypes(self) -> tuple[str, ...]:
        declared = tuple(self.account.loaded.declared.get("dtypes", DTYPES))
        asked = self.options.dtypes
        if asked is None:
            return declared
        for dtype in asked:
            if dtype not in declared:
                reason = f"{dtype} is not among the declared dtypes ({', '.join(declared)})"
                self.account.skipped["every check", reason] += 1
        return tuple(d for d in asked if d in declared)

    def _runnable(self, planned: list[Planned]) -> list[str]:
        """Ids of what can run here; the rest goes into the ledger."""
        ids = []
        for p in planned:
            if (why := self.backend.cannot_run(p)) is not None:
                self.account.take(Answer(p.id, "skipped", why))
            else:
                ids.append(p.id)
        return ids

    # ------------------------------------------------------------------------------------- search, confirm and explain

    def _search(self, examples: int) -> None:
        """Hypothesis draws cases; what it finds is one failure, its smallest case."""
        from moe_harness.harness.run.property_search import falsify

        def heard(case: Case) -> Answer:
            answer = self.backend.ask_drawn(case)
            self.listener.advance("property", COUNTED_AS.get(answer.status, answer.status))
            return answer

        seconds = self.backend.search_seconds[self.request.profile]
        drawn = self.backend.drawn(self.request.dtypes)
        for answer in falsify(drawn, heard, examples=examples, start=self.request.seed, seconds=seconds):
            self.account.take(answer)
        self.account.to_draw = 0  # it may end early: what it has to do is not a number of cases

    def _confirm(self) -> None:
        """Judge failures again, alone in a fresh process: one that passes there depends on the calls before it."""
        seen: Counter = Counter()
        for failure in self.account.failures:
            seen[failure["check"]] += 1
            if seen[failure["check"]] > CONFIRMED_PER_CHECK or self.backend.deaths:
                continue
            alone = self.backend.judge_alone([failure["case"]])
            if alone is None or alone.fails:
                continue
            before = self.backend.history_of(failure["case"])[-1:]
            after = self.backend.judge_alone([*before, failure["case"]]) if before else None
            again = after is not None and after.fails
            told = "it passes alone in a fresh process: the result depends on earlier calls"
            failure["looks_like"].insert(0, told + (", the one before suffices" if again else ", or on chance"))
            failure["replay"] = self.account.replay_line([*before, failure["case"]] if again else [failure["case"]])

    def _explain_at_once(self, failure: Failure) -> None:
        """The cause of the first failure, before it is told: others may be at work."""
        self._ask(failure, self.backend.explain_alone)

    def _explain(self) -> None:
        """Ask for the cause of each cluster's smallest case and of each check's first."""
        self.account.failures.sort(key=self.account.place)
        placed = [failure for failure in self.account.failures if failure["where"]]
        smallest = [each.smallest.id for each in self.account.clustered()]
        first = {failure["check"]: failure for failure in reversed(placed)}
        chosen = [failure for failure in placed if failure["case"] in smallest][:EXPLAINED]
        for failure in [*chosen, *sorted(first.values(), key=self.account.place)[:EXPLAINED]]:
            self._ask(failure, self.backend.explain)

    def _ask(self, failure: Failure, explain: Callable[[str], Explanation | None]) -> None:
        """What raised or died, and so is nowhere, has told its own, and so has what says nothing of how it came."""
        plain = any(entry["fault"] in PLAIN for entry in failure["diagnosis"])
        if failure["where"] and not plain and failure["case"] not in self.asked:
            told = explain(failure["case"])
            add_cause(failure, told)
            self.asked |= {failure["case"]} if told is not None else set()

    def _describe(self) -> None:
        """Let the probes tell how a right implementation computes."""
        if self.account.failures or self.stage not in stages_with("probes") or self.options.partial:
            return
        text = self.backend.describe()
        if text:
            self.account.heard["", "how it computes"][text] += 1

    def _check_declared_dtypes(self) -> None:
        """A dtype that is declared in so many words and refused on every case is a false declaration."""
        heard = self.account
        if "dtypes" not in heard.loaded.declared.get("explicit", ()) or not heard.executed:
            return
        for dtype in heard.request.dtypes:
            refusals = [i for ids in heard.refused.values() for i in ids if f"dtype={dtype}" in i or dtype == "fp32"]
            if refusals and all(case.dtype != dtype for _, case in heard.executed):
                heard.fail(refusals[0], Finding(f"declares the dtype {dtype}, but refuses every case in it"))


def judge(
    stage: str, spec: str, request: Request, options: RunOptions, listener: Any = None, *,
    worlds: tuple[int, ...] = (), keep: Keep | None = None,
) -> Result:  # fmt: skip
    """Judge one implementation on one device, or over these numbers of ranks; raises where it cannot be loaded."""
    return Session(
        backend(stage, spec, request, options, worlds), stage, spec, request, options, listener or Listener(), keep
    ).judge()


def backend(stage: str, spec: str, request: Request, options: RunOptions, worlds: tuple[int, ...]) -> Backend:
    """Where a run judges."""
    if worlds:
        from moe_harness.harness.ranks.backend import OverRanks

        return OverRanks(stage, spec, request.device, worlds, options.timeout)
    return Pool(stage, spec, request.device, worker_count(request.device), options.timeout)


def error_result(stage: str, spec: str, request: Request, error: HarnessError) -> Result:
    """What stands for an implementation that could not be loaded, beside others that could."""
    account = ResultBuilder(stage, spec, request, Listener())
    account.error = str(error)
    return account.result()
