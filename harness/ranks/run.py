"""A run over many ranks: `moe-harness check --stage dispatcher --ranks 1,2,3,4`, with the result every run has."""

import time
from collections import Counter
from typing import Any

from harness.cases import Case
from harness.cases.request import Request
from harness.engine import Listener, Options, Run
from harness.errors import UsageError
from harness.ranks import cases, strategies
from harness.ranks.judge import Verdict, judge
from harness.report import Result

EXAMPLES = {"quick": 60, "full": 500, "exhaustive": 3000}
KIND_NAMES = {"merged": "merged_column", "column": "column", "row": "row", "replicated": "replicated"}


class RankRun(Run):
    """One dispatcher or sharded layer over several world sizes."""

    def __init__(
        self, stage: str, spec: str, request: Request, options: Options, listener: Any, worlds: tuple[int, ...]
    ):
        super().__init__(stage, spec, request, options, listener)
        self.worlds, self.backend = worlds, "nccl" if request.device == "cuda" else "gloo"

    def parse(self, case_id: str) -> tuple[str, Case]:
        return cases.parse_id(case_id)

    def judge(self) -> Result:
        """Every planned case, then Hypothesis; the pool of ranks is rebuilt after whatever breaks it.

        Raises:
            UsageError, CannotJudge: the implementation cannot be found or imported.
        """
        from harness.worker_versions import versions

        self.loaded = {"declared": {}, "versions": versions()}
        planned = self._planned_ids()
        self.places = {case_id: place for place, case_id in enumerate(planned)}
        sizes = Counter(cases.parse_id(case_id)[0] for case_id in planned)
        examples = EXAMPLES[self.request.profile]
        self.listener.start(self.spec, {**sizes, "property": examples})
        try:
            for case_id in planned:
                self._judge_one(case_id)
            self._search_ranks(examples)
        except KeyboardInterrupt:
            self.interrupted = True
            self.listener.note("interrupted: this is what was judged until then")
        return self.result()

    def _planned_ids(self) -> list[str]:
        profile, seed = self.request.profile, self.request.seed
        if self.stage == "dispatcher":
            planned = cases.dispatcher_cases(self.worlds, profile=profile, seed=seed)
        else:
            planned = cases.linear_cases(self.worlds, kind_of(self.spec), profile=profile, seed=seed)
        wanted = self.options.dtypes or cases.DTYPES
        return [cases.case_id(check, case) for check, case in planned if case.dtype in wanted]

    def _judge_one(self, case_id: str) -> Verdict:
        started = time.monotonic()
        verdict = judge(self.spec, case_id, backend=self.backend, budget=self.options.timeout)
        self.take(as_answer(verdict, time.monotonic() - started))
        return verdict

    def _search_ranks(self, examples: int) -> None:
        from harness.strategies import falsify

        check = cases.CHECKS[self.stage][0]
        if self.stage == "dispatcher":
            drawn = strategies.dispatcher_cases(self.worlds)
        else:
            drawn = strategies.linear_cases(self.worlds, (kind_of(self.spec),))
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
                self.take({**as_answer(verdict, verdict.seconds), "counts_as": "property"})


def kind_of(spec: str) -> str:
    """Which sharded layer a class is, by its name; UsageError where the name does not tell."""
    name = spec.rpartition(":")[2].lower()
    for part, kind in KIND_NAMES.items():
        if part in name:
            return kind
    raise UsageError(f"the class {spec!r} should have Replicated, MergedColumn, Column or Row in its name: "
                     "it is judged as the layer that its name says")  # fmt: skip


def as_answer(verdict: Verdict, seconds: float) -> dict[str, Any]:
    """A verdict in the form that a worker's answer has."""
    status = "failed" if verdict.findings else "passed" if verdict.unsupported is None else "unsupported"
    findings = [{**f, "looks_like": [], "headroom": f.get("headroom") or float("inf")} for f in verdict.findings]
    return {
        "id": verdict.case,
        "status": status,
        "reason": verdict.unsupported,
        "seconds": seconds,
        "findings": findings,
        "worst": max([f["headroom"] for f in findings], default=0.0),
        "elements": 0,
        "histogram": [],
        "observations": {},
    }


def judge_ranks(
    stage: str, spec: str, request: Request, options: Options, worlds: tuple[int, ...], listener: Any
) -> Result:
    """Judge one implementation of a stage that runs on many ranks."""
    return RankRun(stage, spec, request, options, listener or Listener(), worlds).judge()
