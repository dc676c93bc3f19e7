"""A run: plan, judge in worker processes, search with Hypothesis, confirm failures, and put the result together."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moe_harness.harness.core.case import Case, parse_id
from moe_harness.harness.core.errors import CannotJudge, HarnessError
from moe_harness.harness.core.findings import Answer, Finding
from moe_harness.harness.core.folders import stages_with
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Planned, plan
from moe_harness.harness.core.request import EXAMPLES, Request
from moe_harness.harness.process.pool import EXPLAINED, Pool, worker_count
from moe_harness.harness.report import Result
from moe_harness.harness.run.result_builder import COUNTED_AS, NEEDS_CUDA, Listener, ResultBuilder, add_cause

SEARCH_SECONDS = {"quick": 15.0, "full": 120.0, "exhaustive": 900.0}
CONFIRMED_PER_CHECK = 2  # failures judged once more, alone in a fresh process
INTERPRETED_STEPS = 600  # a step of a Triton kernel takes some 10 ms in the interpreter
INTERPRETED_PATIENCE = 5  # ... and a case that many times longer than a kernel that is compiled may


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
    """What a run on one device and one over many ranks have in common."""

    def __init__(
        self, stage: str, spec: str, request: Request, options: RunOptions, listener: Any,
        checks: tuple[str, ...] = (),
    ):  # fmt: skip
        self.stage, self.spec, self.options, self.listener = stage, spec, options, listener
        self.account = ResultBuilder(stage, spec, request, listener, partial=options.partial, checks=checks)

    @property
    def request(self) -> Request:
        """What is judged; once the implementation is loaded, with the dtypes that it declares."""
        return self.account.request

    def _wants(self, check: str) -> bool:
        return self.options.checks is None or check in self.options.checks

    def _searches(self) -> bool:
        return self.options.cases is None and self._wants("property")

    def _search(self, drawn: Any, ask: Callable[[Case], Answer], *, examples: int, seconds: float) -> None:
        """Hypothesis draws cases; what it finds is one failure, its smallest case."""
        from moe_harness.harness.run.property_search import falsify

        def heard(case: Case) -> Answer:
            answer = ask(case)
            self.listener.advance("property", COUNTED_AS.get(answer.status, answer.status))
            return answer

        for answer in falsify(drawn, heard, examples=examples, start=self.request.seed, seconds=seconds):
            self.account.take(answer)


class Run(Session):
    """One implementation under judgement on one device."""

    def __init__(self, stage: str, spec: str, request: Request, options: RunOptions, listener: Any):
        super().__init__(stage, spec, request, options, listener)
        self.pool: Pool | None = None
        self.account.explain = self._explain_at_once

    def judge(self) -> Result:
        """Do all of it.

        Raises:
            UsageError, CannotJudge: the implementation cannot be loaded; nothing has been judged then.
        """
        try:
            device = self.request.device
            with Pool(self.stage, self.spec, device, worker_count(device), self.options.timeout) as pool:
                self._judge_with(pool)
        except KeyboardInterrupt:
            self.account.interrupt()
        return self.account.result()

    def _judge_with(self, pool: Pool) -> None:
        self.account.loaded = pool.start()
        if self.account.loaded.interpreted:
            pool.budget *= INTERPRETED_PATIENCE
        planned = self._planned()
        self.account.expect([p.id for p in planned])
        sizes = Counter(p.check for p in planned)
        searched = {"property": EXAMPLES[self.request.profile]} if self._searches() else {}
        self.listener.start(self.spec, {**sizes, **searched})
        self.pool, runnable = pool, self._runnable(planned)
        for answer in self._answers(pool, runnable):
            self.account.take(answer)
            if self.options.fail_fast and self.account.failures:
                self.account.leave_out(runnable, "--fail-fast ended the run at the first failure")
                return
        if self._searches():
            self._draw(pool)
        self._confirm(pool)
        self._check_declared_dtypes()
        self._explain(pool)
        self._describe(pool)

    def _answers(self, pool: Pool, ids: list[str]) -> Iterator[Answer]:
        """Cases that fill a GPU's memory come last, one at a time."""
        large = [case_id for case_id in ids if case_id.split("/")[1] == "large_offsets"]
        yield from pool.judge(case_id for case_id in ids if case_id not in large)
        for case_id in large:
            yield pool.judge_one(case_id)

    def _dtypes(self) -> tuple[str, ...]:
        declared = self.account.loaded.dtypes
        asked = self.options.dtypes
        if asked is None:
            return declared
        for dtype in asked:
            if dtype not in declared:
                reason = f"{dtype} is not among the declared dtypes ({', '.join(declared)})"
                self.account.skipped["every check", reason] += 1
        return tuple(d for d in asked if d in declared)

    def _planned(self) -> list[Planned]:
        dtypes = self._dtypes()
        if not dtypes:
            declared = ", ".join(self.account.loaded.dtypes)
            asked = ", ".join(self.options.dtypes or ())
            raise CannotJudge(f"{self.spec!r} declares the dtypes {declared}, but --dtype asks for {asked}")
        self.account.request = replace(self.request, dtypes=dtypes)
        if self.options.cases is not None:
            return [Planned(check, case) for _, check, case in map(parse_id, self.options.cases)]
        return [p for p in plan(self.stage, self.request) if self._wants(p.check)]

    def _runnable(self, planned: list[Planned]) -> list[str]:
        """Ids of what can run on this device; the rest goes into the ledger."""
        ids = []
        interpreted = self.account.loaded.interpreted
        for p in planned:
            if p.check in ON_CUDA_ONLY and self.request.device != "cuda":
                self.account.take(Answer(p.id, "skipped", NEEDS_CUDA))
            elif interpreted and p.case.steps() > INTERPRETED_STEPS:
                reason = f"more than {INTERPRETED_STEPS} tiles take too long in Triton's interpreter"
                self.account.take(Answer(p.id, "skipped", reason))
            else:
                ids.append(p.id)
        return ids

    # --------------------------------------------------------------------------------------------- search and confirm

    def _draw(self, pool: Pool) -> None:
        from moe_harness.harness.run.property_search import cases

        profile = self.request.profile
        self._search(
            cases(self.stage, self.request.dtypes), lambda case: pool.judge_one(Planned("property", case).id),
            examples=EXAMPLES[profile], seconds=SEARCH_SECONDS[profile],
        )  # fmt: skip

    def _confirm(self, pool: Pool) -> None:
        """Judge failures again, alone in a fresh process: one that passes there depends on the calls before it."""
        seen: Counter = Counter()
        for failure in self.account.failures:
            seen[failure["check"]] += 1
            if seen[failure["check"]] > CONFIRMED_PER_CHECK or pool.deaths:
                continue
            if pool.judge_alone([failure["case"]]).fails:
                continue
            before = pool.history_of(failure["case"])[-1:]
            again = before and pool.judge_alone([*before, failure["case"]]).fails
            told = "it passes alone in a fresh process: the result depends on earlier calls"
            failure["looks_like"].insert(0, told + (", the one before suffices" if again else ", or on chance"))
            failure["replay"] = self.account.replay_line([*before, failure["case"]] if again else [failure["case"]])

    def _explain_at_once(self, failure: Any) -> None:
        """The cause of the first failure, by a process of its own: the others are at work."""
        if self.pool is not None and failure["where"]:  # what raised or died, and so is nowhere, has told its own
            add_cause(failure, self.pool.explain_alone(failure["case"]))

    def _explain(self, pool: Pool) -> None:
        """Ask for the cause of each cluster's smallest case and of each check's first; what raised has told its own."""
        self.account.failures.sort(key=self.account.place)
        placed = [failure for failure in self.account.failures if failure["where"]]
        smallest = [each.smallest.id for each in self.account.clustered()]
        first = {failure["check"]: failure for failure in reversed(placed)}
        chosen = [failure for failure in placed if failure["case"] in smallest][:EXPLAINED]
        for failure in [*chosen, *sorted(first.values(), key=self.account.place)[:EXPLAINED]]:
            if "known" not in failure:
                add_cause(failure, pool.explain(failure["case"]))

    def _describe(self, pool: Pool) -> None:
        """Let the probes tell how a right implementation computes."""
        if self.account.failures or self.stage not in stages_with("probes") or self.options.partial:
            return
        text = pool.ask(2 * SEARCH_SECONDS["quick"], "describe")
        if text:
            self.account.heard["", "how it computes"][text] += 1

    def _check_declared_dtypes(self) -> None:
        """A dtype that is declared in so many words and refused on every case is a false declaration."""
        heard = self.account
        if "dtypes" not in heard.loaded.declared.get("explicit", ()) or not heard.executed:
            return
        for dtype in heard.request.dtypes:
            refusals = [i for ids in heard.refused.values() for i in ids if f"dtype={dtype}" in i or dtype == "fp32"]
            if refusals and all(case.dtype != dtype for case in heard.executed):
                heard.fail(refusals[0], Finding(f"declares the dtype {dtype}, but refuses every case in it"))


def judge(stage: str, spec: str, request: Request, options: RunOptions, listener: Any = None) -> Result:
    """Judge one implementation; a HarnessError ends it only when it cannot be loaded at all."""
    return Run(stage, spec, request, options, listener or Listener()).judge()


def error_result(stage: str, spec: str, request: Request, error: HarnessError) -> Result:
    """What stands for an implementation that could not be loaded, beside others that could."""
    account = ResultBuilder(stage, spec, request, Listener())
    account.error = str(error)
    return account.result()
