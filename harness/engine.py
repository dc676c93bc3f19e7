"""A run: plan, judge in worker processes, search with Hypothesis, confirm failures, and put the result together."""

import re
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from harness.cases import Case, parse_id, plan
from harness.cases.names import DESCRIBED_STAGES
from harness.cases.plans import ON_CUDA_ONLY, Planned
from harness.cases.request import Request
from harness.errors import CannotJudge, HarnessError
from harness.findings import HISTOGRAM_EDGES, MAX_Z
from harness.pool import EXPLAINED, Pool, worker_count
from harness.report import Result
from harness.report.results import Check, Coverage, Failure, Power

EXAMPLES = {"quick": 200, "full": 500, "exhaustive": 3000}
SEARCH_SECONDS = {"quick": 15.0, "full": 120.0, "exhaustive": 900.0}
CONFIRMED_PER_CHECK = 2  # failures judged once more, alone in a fresh process
INTERPRETED_STEPS = 600  # a step of a Triton kernel takes some 10 ms in the interpreter
INTERPRETED_PATIENCE = 5  # ... and a case that many times longer than a kernel that is compiled may
HEATMAPS_PER_CHECK = 5
CORE_CHECKS = ("contract", "exact", "numeric", "routing", "dense", "live", "shard")


@dataclass
class Options:
    """How to judge, beside what (`Request`)."""

    dtypes: tuple[str, ...] | None = None  # None: those the implementation declares
    timeout: float = 60.0
    checks: tuple[str, ...] | None = None  # None: all of the stage


@dataclass
class Listener:
    """What a display wants to hear; the methods of `harness.report.Progress`."""

    start: Callable[[str, dict[str, int]], None] = lambda impl, plan: None
    advance: Callable[[str, str], None] = lambda check, status: None
    failure: Callable[[dict[str, Any]], None] = lambda failure: None
    note: Callable[[str], None] = lambda text: None


@dataclass
class Tally:
    """Everything heard about one check."""

    counts: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    worst: float = 0.0

    def as_check(self, name: str) -> Check:
        return {
            "name": name, "cases": self.counts.total(), "failed": self.counts["failed"],
            "unsupported": self.counts["unsupported"], "skipped": self.counts["skipped"],
            "seconds": round(self.seconds, 3), "worst": self.worst,
        }  # fmt: skip


class Run:
    """One implementation under judgement.  `result` is complete at any time, so that an interruption loses nothing."""

    def __init__(self, stage: str, spec: str, request: Request, options: Options, listener: Any):
        self.stage, self.spec, self.request, self.options, self.listener = stage, spec, request, options, listener
        self.started = time.monotonic()
        self.tallies: dict[str, Tally] = {}
        self.failures: list[Failure] = []
        self.refused: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.skipped: dict[tuple[str, str], int] = Counter()
        self.executed: list[Case] = []
        self.histogram = [0] * len(HISTOGRAM_EDGES)
        self.elements = 0
        self.heard: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self.loaded: dict[str, Any] = {"declared": {}, "versions": {}}
        self.places: dict[str, int] = {}  # of each case in the plan
        self.power: Power = {"proved": 0, "replaced": []}  # data sets that reject every wrong output
        self.error: str | None = None
        self.interrupted = False

    def judge(self) -> Result:
        """Do all of it.

        Raises:
            UsageError, CannotJudge: the implementation cannot be loaded; nothing has been judged then.
        """
        try:
            with Pool(self.stage, self.spec, self.request.device, worker_count(self.request.device),
                      self.options.timeout) as pool:  # fmt: skip
                self._judge_with(pool)
        except KeyboardInterrupt:
            self.interrupted = True
            self.listener.note("interrupted: this is what was judged until then")
        return self.result()

    def _judge_with(self, pool: Pool) -> None:
        self.loaded = pool.start()
        if self.loaded.get("interpreted"):
            pool.budget *= INTERPRETED_PATIENCE
        planned = self._planned()
        self.places = {p.id: place for place, p in enumerate(planned)}
        sizes = Counter(p.check for p in planned)
        self.tallies = {check: Tally() for check in sizes}  # in the plan's order, whatever comes back first
        self.listener.start(self.spec, {**sizes, **({"property": self._examples()} if self._wants("property") else {})})
        for answer in self._answers(pool, self._runnable(planned)):
            self.take(answer)
        if self._wants("property"):
            self._search(pool)
        self._confirm(pool)
        self._check_declared_dtypes()
        self._explain(pool)
        self._describe(pool)

    def _answers(self, pool: Pool, ids: list[str]) -> Iterator[dict[str, Any]]:
        """Cases that fill a GPU's memory come last, one at a time."""
        large = [case_id for case_id in ids if case_id.split("/")[1] == "large_offsets"]
        yield from pool.judge(case_id for case_id in ids if case_id not in large)
        for case_id in large:
            yield pool.judge_one(case_id)

    def _dtypes(self) -> tuple[str, ...]:
        declared = tuple(self.loaded["declared"]["dtypes"])
        asked = self.options.dtypes
        if asked is None:
            return declared
        for dtype in asked:
            if dtype not in declared:
                self.skipped["every check", f"{dtype} is not among the declared dtypes ({', '.join(declared)})"] += 1
        return tuple(d for d in asked if d in declared)

    def _planned(self) -> list[Planned]:
        dtypes = self._dtypes()
        if not dtypes:
            raise CannotJudge(f"{self.spec!r} declares the dtypes {', '.join(self.loaded['declared']['dtypes'])}, "
                              f"but --dtype asks for {', '.join(self.options.dtypes or ())}")  # fmt: skip
        self.request = Request(
            self.request.profile, self.request.device, dtypes, self.request.configs, self.request.seed
        )
        return [p for p in plan(self.stage, self.request) if self._wants(p.check)]

    def _wants(self, check: str) -> bool:
        return self.options.checks is None or check in self.options.checks

    def _runnable(self, planned: list[Planned]) -> list[str]:
        """Ids of what can run on this device; the rest goes into the ledger."""
        ids = []
        interpreted = self.loaded.get("interpreted", False)
        for p in planned:
            if p.check in ON_CUDA_ONLY and self.request.device != "cuda":
                self.take({"id": p.id, "status": "skipped", "reason": "needs --device cuda"})
            elif interpreted and p.case.steps() > INTERPRETED_STEPS:
                reason = f"more than {INTERPRETED_STEPS} tiles take too long in Triton's interpreter"
                self.take({"id": p.id, "status": "skipped", "reason": reason})
            else:
                ids.append(p.id)
        return ids

    # ------------------------------------------------------------------------------------------------ what comes back

    def parse(self, case_id: str) -> tuple[str, Case]:
        """(check, case) of an id."""
        return parse_id(case_id)[1:]

    def take(self, answer: dict[str, Any]) -> None:
        """Count one answer of a worker."""
        check, case = self.parse(answer["id"])
        check = answer.get("counts_as", check)
        tally = self.tallies.setdefault(check, Tally())
        status = {"died": "failed", "error": "skipped"}.get(answer["status"], answer["status"])
        tally.counts[status] += 1
        tally.seconds += answer.get("seconds", 0.0)
        tally.worst = max(tally.worst, answer.get("worst", 0.0))
        if status == "unsupported":
            alike = re.sub(r"\d+", "#", answer["reason"])  # one entry for messages that differ in sizes only
            self.reasons.setdefault(alike, answer["reason"])
            self.refused[alike].append(answer["id"])
        elif status == "skipped":
            self.skipped[
                check, answer["reason"].splitlines()[-1] if answer["status"] == "error" else answer["reason"]
            ] += 1
            if answer["status"] == "error":
                self.error = answer["reason"]
        else:
            self._take_executed(check, case, answer)
        if check != "property":
            self.listener.advance(check, status)

    def _take_executed(self, check: str, case: Case, answer: dict[str, Any]) -> None:
        judged = self._judged_as(answer)
        case = self.parse(judged)[1]
        self.executed.append(case.but(variant=f"{check}:{case.variant}"))
        self.elements += answer["elements"]
        self.histogram = [a + b for a, b in zip(self.histogram, answer["histogram"] or self.histogram, strict=True)]
        for name, text in answer["observations"].items():
            self.heard[check, name][text] += 1
        if answer["status"] == "died":
            self._fail(judged, {"message": answer["reason"], "headroom": float("inf")})
        for finding in answer["findings"][:1]:  # one failure per case; the others are mostly its consequences
            self._fail(judged, finding)

    def _judged_as(self, answer: dict[str, Any]) -> str:
        """The id of the data that judged: the planned ones, or those that took the place of data without power."""
        planned, judged = answer["id"], answer.get("judged", answer["id"])
        power = answer.get("power", {"rejected": 0, "accepted": []})
        self.power["proved"] += bool(power["rejected"])
        if judged != planned:
            self.power["replaced"].append({"case": planned, "by": judged, "accepted": power["accepted"]})
            self.places.setdefault(judged, self.places.get(planned, len(self.places)))
        return judged

    def _fail(self, case_id: str, finding: dict[str, Any]) -> None:
        failure: Failure = {
            "check": case_id.split("/")[1], "case": case_id, "message": finding["message"],
            "headroom": finding.get("headroom"), "where": finding.get("where", {}),
            "looks_like": finding.get("looks_like", []), "diagnosis": finding.get("diagnosis", []),
            "replay": self._replay_line([case_id]), "heatmap": finding.get("heatmap"),
        }  # fmt: skip
        self.failures.append(failure)
        self.listener.failure(failure)

    def _replay_line(self, case_ids: list[str]) -> str:
        device = f" --device {self.request.device}" if self.request.device != "cpu" else ""
        return f"moe-harness replay {shlex.join(case_ids)} --impl {shlex.quote(self.spec)}{device}"

    # --------------------------------------------------------------------------------------------- search and confirm

    def _examples(self) -> int:
        return EXAMPLES[self.request.profile]

    def _search(self, pool: Pool) -> None:
        """Hypothesis draws cases; what it finds is one failure, its smallest case."""
        from harness import strategies

        end = time.monotonic() + SEARCH_SECONDS[self.request.profile]
        answers: dict[str, dict[str, Any]] = {}

        def judge(case: Case) -> bool:
            answer = pool.judge_one(Planned("property", case).id)
            answers[case.id()] = answer
            self.listener.advance(
                "property", {"died": "failed", "error": "skipped"}.get(answer["status"], answer["status"])
            )
            return answer["status"] not in ("failed", "died")

        smallest = strategies.search(self.stage, self.request.dtypes, judge, examples=self._examples(),
                                     start=self.request.seed, out_of_time=lambda: time.monotonic() > end)  # fmt: skip
        for name, answer in answers.items():
            if answer["status"] not in ("failed", "died") or (smallest is not None and name == smallest.id()):
                self.take(answer)

    def _confirm(self, pool: Pool) -> None:
        """Judge failures again, alone in a fresh process: one that passes there depends on the calls before it."""
        seen: Counter = Counter()
        for failure in self.failures:
            seen[failure["check"]] += 1
            if seen[failure["check"]] > CONFIRMED_PER_CHECK or pool.deaths:
                continue
            if pool.judge_alone([failure["case"]])["status"] in ("failed", "died"):
                continue
            before = pool.history_of(failure["case"])[-1:]
            again = before and pool.judge_alone([*before, failure["case"]])["status"] in ("failed", "died")
            told = "it passes alone in a fresh process: the result depends on earlier calls"
            failure["looks_like"].insert(0, told + (", the one before suffices" if again else ", or on chance"))
            failure["replay"] = self._replay_line([*before, failure["case"]] if again else [failure["case"]])

    def _explain(self, pool: Pool) -> None:
        """Ask for the cause of the first failures, one of each check; what raised or died has told its own."""
        self.failures.sort(key=self._place)
        first = {failure["check"]: failure for failure in reversed(self.failures) if failure["where"]}
        for failure in sorted(first.values(), key=self._place)[:EXPLAINED]:
            pool.explain(failure["case"], failure)

    def _describe(self, pool: Pool) -> None:
        """Let the probes tell how a right implementation computes."""
        if self.failures or self.stage not in DESCRIBED_STAGES or self.options.checks is not None:
            return
        text = pool.ask(2 * SEARCH_SECONDS["quick"], "describe")
        if text:
            self.heard["", "how it computes"][text] += 1

    def _place(self, failure: Failure) -> int:
        """Where a failure's case stands in the plan; failures are told in that order, not as they came."""
        return self.places.get(failure["case"], len(self.places))

    def _check_declared_dtypes(self) -> None:
        """A dtype that is declared in so many words and refused on every case is a false declaration."""
        if "dtypes" not in self.loaded["declared"].get("explicit", ()) or not self.executed:
            return
        for dtype in self.request.dtypes:
            refusals = [i for ids in self.refused.values() for i in ids if f"dtype={dtype}" in i or dtype == "fp32"]
            if refusals and all(case.dtype != dtype for case in self.executed):
                self._fail(refusals[0], {"message": f"declares the dtype {dtype}, but refuses every case in it"})

    # --------------------------------------------------------------------------------------------------------- result

    def result(self) -> Result:
        """What is known by now."""
        self.failures.sort(key=self._place)
        seen: Counter = Counter()
        for failure in self.failures:
            seen[failure["check"]] += 1
            if seen[failure["check"]] > HEATMAPS_PER_CHECK:
                failure["heatmap"] = None  # 500 failures would make a document of 15 MB
        return {
            "schema": 1, "verdict": self._verdict(), "stage": self.stage, "impl": self.spec,
            "device": self.request.device,
            "dtypes": list(self.request.dtypes), "profile": self.request.profile,
            "config": ", ".join(shape.name for shape in self.request.configs) or None, "seed": self.request.seed,
            "seconds": round(time.monotonic() - self.started, 2), "versions": self.loaded["versions"],
            "declared": {k: v for k, v in self.loaded["declared"].items() if k != "explicit"}, "error": self.error,
            "interrupted": self.interrupted,
            "checks": [tally.as_check(name) for name, tally in self.tallies.items() if tally.counts],
            "failures": self.failures, "coverage": self._coverage(),
            "statistics": {"z_histogram": {"edges": [*HISTOGRAM_EDGES, None], "counts": self.histogram,
                                           "limit": MAX_Z},
                           "elements": self.elements},
            "observations": self._observations(),
        }  # fmt: skip

    def _verdict(self) -> str:
        if self.failures:
            return "fail"
        if self.error or self.interrupted:
            return "error"
        core = any(c.core() and c.rows() and c.variant.split(":")[0] in CORE_CHECKS for c in self.executed)
        return "pass" if core or (self.executed and self.options.checks) else "unsupported" if self.refused else "error"

    def _coverage(self) -> Coverage:
        axes: dict[str, Counter] = defaultdict(Counter)
        refused = sorted(self.refused.items(), key=lambda item: -len(item[1]))
        for case in self.executed:
            for f in fields(case):
                if f.name not in ("seed", "variant", "optional"):
                    axes[f.name][str(getattr(case, f.name)) or "contiguous"] += 1
        return {
            "executed": len(self.executed),
            "unsupported": [
                {"reason": self.reasons[alike], "cases": len(ids), "example": ids[0]} for alike, ids in refused
            ],
            "skipped": [{"what": what, "reason": why, "cases": n} for (what, why), n in self.skipped.items()],
            "power": self.power,
            "axes": {name: dict(counts) for name, counts in axes.items()},
        }

    def _observations(self) -> list[dict[str, str]]:
        told = []
        for (_, name), counts in self.heard.items():
            if set(counts) <= {"all equal", "differ"}:
                told.append({"name": name, "text": f"bits equal in {counts['all equal']} of {counts.total()} cases"})
            else:
                told += [{"name": name, "text": text} for text in counts]
        return told


def judge(stage: str, spec: str, request: Request, options: Options, listener: Any = None) -> Result:
    """Judge one implementation; a HarnessError ends it only when it cannot be loaded at all."""
    return Run(stage, spec, request, options, listener or Listener()).judge()


def error_result(stage: str, spec: str, request: Request, error: HarnessError) -> Result:
    """What stands for an implementation that could not be loaded, beside others that could."""
    run = Run(stage, spec, request, Options(), Listener())
    run.error = str(error)
    return run.result()
