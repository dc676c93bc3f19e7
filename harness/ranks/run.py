"""A run over many ranks: `moe-harness check --stage dispatcher --ranks 1,2,3,4`, with the result every run has."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.request import Request
from moe_harness.harness.process.pool import EXPLAINED
from moe_harness.harness.ranks import cases, strategies
from moe_harness.harness.ranks.judge import Verdict, judge, planned
from moe_harness.harness.report import Result
from moe_harness.harness.run.result_builder import Account, Listener
from moe_harness.harness.run.session import Options

ENOUGH = 10  # cases that ended the ranks' processes; each costs new ones, and the verdict stands
EXAMPLES = {"quick": 60, "full": 500, "exhaustive": 3000}


class RankRun:
    """One dispatcher or sharded layer over several world sizes."""

    def __init__(
        self, stage: str, spec: str, request: Request, options: Options, listener: Any, worlds: tuple[int, ...],
        keep: Callable[[Result], None],
    ):  # fmt: skip
        self.stage, self.spec, self.request, self.options = stage, spec, request, options
        self.listener, self.keep = listener, keep
        self.worlds, self.backend = worlds, "nccl" if request.device == "cuda" else "gloo"
        self.account = Account(stage, spec, request, listener, partial=options.checks is not None, parse=cases.parse_id)
        self.left: Counter[str] = Counter()  # cases of each check that are planned and not judged yet
        self.broken = 0  # cases that ended the ranks' processes

    def judge(self) -> Result:
        """Every planned case, then Hypothesis; the pool of ranks is rebuilt after whatever breaks it.

        Raises:
            UsageError, CannotJudge: the implementation cannot be found or imported.
        """
        from moe_harness.harness.process.versions import versions

        self.account.loaded = {"declared": {}, "versions": versions()}
        ids = self._planned_ids()
        self.account.expect(ids)
        examples = EXAMPLES[self.request.profile]
        self.left = Counter(cases.parse_id(case_id)[0] for case_id in ids) + Counter({"property": examples})
        self.listener.start(self.spec, dict(self.left))
        self._keep_unfinished()
        try:
            for case_id in ids:
                self._judge_one(case_id)
                self.left[cases.parse_id(case_id)[0]] -= 1
                self._keep_unfinished()
                if self.broken >= ENOUGH:
                    self.listener.note(f"stopped: {ENOUGH} cases have ended the ranks' processes")
                    return self.result()
            self._search_ranks(examples)
            del self.left["property"]  # the search may end early; what it has to do is not a number of cases
            self._name_causes()
        except KeyboardInterrupt:
            self.account.interrupt()
        return self.result()

    def result(self, *, final: bool = True) -> Result:
        """What is known by now; a planned case that was not judged keeps it from passing."""
        result = self.account.result(final=final)
        for check, cases_left in (+self.left).items():
            result["coverage"]["skipped"].append({"what": check, "reason": "not judged", "cases": cases_left})
        if +self.left and result["verdict"] == "pass":
            result["verdict"] = "error"
        return result

    def _keep_unfinished(self) -> None:
        """Hand over what is known, marked as cut short: it stands if nothing comes after it."""
        self.keep({**self.result(final=False), "interrupted": True})

    def _planned_ids(self) -> list[str]:
        profile, seed = self.request.profile, self.request.seed
        ids = planned(self.stage, self.spec, self.worlds, profile=profile, seed=seed, backend=self.backend)
        wanted = self.options.dtypes or cases.DTYPES
        return [case_id for case_id in ids if cases.parse_id(case_id)[1].dtype in wanted]

    def _judge_one(self, case_id: str) -> Verdict:
        verdict = judge(self.spec, case_id, backend=self.backend, budget=self.options.timeout)
        self.broken += verdict.failure is not None
        self.account.take(as_answer(verdict))
        return verdict

    def _name_causes(self) -> None:
        """Put the fault that explains it before what the rows say of the first failure of each check."""
        from moe_harness.harness.diagnosis.ranked import named

        first = {failure["check"]: failure for failure in reversed(self.account.failures)}
        for failure in sorted(first.values(), key=self.account.place)[:EXPLAINED]:
            failure["diagnosis"] = named(self.spec, failure["case"], backend=self.backend) + failure["diagnosis"]

    def _search_ranks(self, examples: int) -> None:
        from moe_harness.harness.run.property_search import falsify

        check = cases.CHECKS[self.stage][0]
        drawn: Any
        if self.stage == "dispatcher":
            drawn = strategies.dispatcher_cases(self.worlds)
        else:
            kinds = {cases.parse_id(case_id)[1].kind for case_id in self.account.places}  # type: ignore[attr-defined]
            drawn = strategies.linear_cases(self.worlds, sorted(kinds))
        verdicts: dict[str, Verdict] = {}

        def holds(case: Case) -> bool:
            verdict = judge(self.spec, cases.case_id(check, case), backend=self.backend, budget=self.options.timeout)
            verdicts[case.id()] = verdict
            self.listener.advance("property", "failed" if verdict.findings else "passed")
            return not verdict.findings

        end = time.monotonic() + 30.0
        smallest = falsify(drawn, holds, examples=examples, start=self.request.seed,
                           out_of_time=lambda: time.monotonic() > end)  # fmt: skip
        for name, verdict in verdicts.items():
            if not verdict.findings or (smallest is not None and name == smallest.id()):
                self.account.take({**as_answer(verdict), "counts_as": "property"})


def as_answer(verdict: Verdict) -> dict[str, Any]:
    """A verdict in the form that a worker's answer has."""
    status = "failed" if verdict.findings else "passed" if verdict.unsupported is None else "unsupported"
    findings = [{**f, "looks_like": [], "headroom": f.get("headroom") or float("inf")} for f in verdict.findings]
    return {
        "id": verdict.case,
        "status": status,
        "reason": verdict.unsupported,
        "seconds": verdict.seconds,
        "findings": findings,
        "worst": max([f["headroom"] for f in findings], default=0.0),
        "elements": 0,
        "histogram": [],
        "observations": {},
    }


def judge_ranks(
    stage: str,
    spec: str,
    request: Request,
    options: Options,
    worlds: tuple[int, ...],
    listener: Any,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Judge one implementation of a stage that runs on many ranks; `keep` hears after every case what is known."""
    return RankRun(stage, spec, request, options, listener or Listener(), worlds, keep).judge()
