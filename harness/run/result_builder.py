"""The account of a run: every answer of a worker is entered, and the result is complete at any time."""

import re
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.contracts import RANK_STAGES
from moe_harness.harness.core.findings import HISTOGRAM_EDGES, MAX_Z, Answer, Explanation, Finding, Loaded
from moe_harness.harness.core.plan import NEEDS_CUDA, Planned, Request
from moe_harness.harness.core.ranked_stage import find_ranked
from moe_harness.harness.diagnosis.clusters import Cluster, Outcome, cluster, kind_of, most_common, words_of
from moe_harness.harness.report import Result
from moe_harness.harness.report.results import Check, Coverage, Diagnosis, Failure, FailureCluster, Heatmap, Power

HEATMAPS_PER_CHECK = 5
CORE_CHECKS = ("contract", "exact", "numeric", "routing")  # on one device; over ranks all that are planned
COUNTED_AS = {"died": "failed", "error": "skipped"}  # the other statuses of an answer count as themselves


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
    reasons: Counter = field(default_factory=Counter)  # why cases were not judged
    seconds: float = 0.0
    worst: float = 0.0

    def as_check(self, name: str) -> Check:
        return {
            "name": name, "cases": self.counts.total(), "judged": self.counts["passed"] + self.counts["failed"],
            "failed": self.counts["failed"], "unsupported": self.counts["unsupported"],
            "skipped": self.counts["skipped"],
            "reasons": [{"reason": reason, "cases": cases} for reason, cases in self.reasons.most_common()],
            "seconds": round(self.seconds, 3), "worst": self.worst,
        }  # fmt: skip


def why_skipped(answer: Answer) -> str:
    """The reason in one line, never none: of a traceback the last line that says something."""
    lines = [line.strip() for line in (answer.reason or "").splitlines() if line.strip()]
    if not lines:
        return "the judge gave no reason"
    return lines[-1] if answer.status == "error" else lines[0]


def failure_of(case_id: str, finding: Finding, replay: str = "") -> Failure:
    """A finding of a case, as the report has it."""
    return {
        "check": case_id.split("/")[1], "case": case_id, "message": finding.message, "headroom": finding.headroom,
        "where": finding.where, "looks_like": finding.looks_like,
        "diagnosis": cast(list[Diagnosis], finding.diagnosis), "replay": replay,
        "heatmap": cast(Heatmap | None, finding.heatmap),
    }  # fmt: skip


def add_cause(failure: Failure, told: Explanation | None) -> None:
    """Enter why it fails, where that was found out, into a failure."""
    if told is not None:
        failure["diagnosis"] = [*cast(list[Diagnosis], told.diagnosis), *failure["diagnosis"]]
        if told.known is not None:
            failure["known"] = told.known
        failure["looks_like"] = list(dict.fromkeys([*failure["looks_like"], *told.looks_like]))


def cause_of(failures: Iterable[Failure]) -> str | None:
    """What most of the failures come down to that were asked for their cause; None where half of them say nothing.

    Calls of one shape may all be zero, of a kernel that computes the wrong thing: that is no name for the others.
    """
    asked = [failure for failure in failures if failure["diagnosis"] or failure.get("known")]
    causes = [failure["diagnosis"][0]["fault"] for failure in asked if failure["diagnosis"]]
    name = most_common(causes)
    return name if 2 * causes.count(name or "") >= len(asked) else None


def _by_cause(clusters: Sequence[FailureCluster]) -> list[FailureCluster]:
    """Clusters of one cause as one, the largest first: a sampler without its temperature had ten."""
    groups: dict[str, list[FailureCluster]] = {}
    for number, each in enumerate(clusters):
        groups.setdefault(each["cause"] or f"none {number}", []).append(each)
    found = [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]
    return sorted(found, key=lambda each: -each["failed"])


def _joined(parts: list[FailureCluster]) -> FailureCluster:
    conditions = [each["condition"] for each in parts]
    joined = None if None in conditions else " or ".join(f"{condition}" for condition in conditions)
    return {
        **parts[0], "kinds": list(dict.fromkeys(kind for each in parts for kind in each["kinds"])), "condition": joined,
        "failed": sum(each["failed"] for each in parts), "passed": sum(each["passed"] for each in parts),
        "passed_without": min(each["passed_without"] for each in parts), "parts": parts,
    }  # fmt: skip


class ResultBuilder:
    """What is known of one implementation.

    `request` is what is judged, `partial` whether only some checks were asked for; of a run over ranks `checks` are its
    checks and `worlds` the numbers of ranks of which each has to be judged.
    """

    def __init__(
        self, stage: str, spec: str, request: Request, listener: Any, *, partial: bool = False,
        checks: tuple[str, ...] = (), worlds: tuple[int, ...] = (),
    ):  # fmt: skip
        self.stage, self.spec, self.request, self.listener = stage, spec, request, listener
        self.partial, self.worlds = partial, worlds
        checks = checks or (find_ranked(stage).checks if stage in RANK_STAGES else ())
        self.core_check, self.core_checks = ("contract", CORE_CHECKS) if not checks else (checks[0], checks)
        self.explain: Callable[[Failure], None] = lambda failure: None  # adds the cause to the first, before it is told
        self.started = time.monotonic()
        self.loaded = Loaded()
        self.places: dict[str, int] = {}  # of each case in the plan
        self.planned: list[str] = []
        self.to_draw = 0  # cases that the search has still to draw
        self.answered: set[str] = set()
        self.error: str | None = None
        self.interrupted = False
        self.tallies: dict[str, Tally] = {}
        self.failures: list[Failure] = []
        self.refused: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.skipped: dict[tuple[str, str], int] = Counter()
        self.executed: list[Planned] = []
        self.core: set[tuple[str, bool]] = set()  # parts of the contract's core of which a case was, or was not, judged
        self.core_refused: list[str] = []
        self.outcomes: list[Outcome] = []
        self._clustered: tuple[int, list[Cluster]] | None = None
        self.histogram = [0] * len(HISTOGRAM_EDGES)
        self.elements = 0
        self.heard: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self.power: Power = {"proved": 0, "replaced": []}  # data sets that reject every wrong output

    def expect(self, ids: list[str], to_draw: int = 0) -> None:
        """What is planned: checks and failures are told in this order, whatever comes back first."""
        self.planned, self.to_draw = ids, to_draw
        self.places = {case_id: place for place, case_id in enumerate(ids)}
        self.tallies = {parse_id(case_id)[1]: Tally() for case_id in ids}

    def leave_out(self, case_ids: Iterable[str], reason: str) -> None:
        """Enter the cases of these that nothing was heard of as skipped."""
        for case_id in case_ids:
            if case_id not in self.answered:
                self.take(Answer(case_id, "skipped", reason))
        self.to_draw = 0

    def interrupt(self) -> None:
        """Ctrl-C: the result is what is known until then."""
        self.interrupted = True
        self.listener.note("interrupted: this is what was judged until then")

    # ------------------------------------------------------------------------------------------------ what comes back

    def take(self, answer: Answer) -> None:
        """Count one answer of a worker."""
        _, check, case = parse_id(answer.id)
        self.answered.add(answer.id)
        if check == self.core_check and case.core() and case.rows():
            self.core.add((case.part(), answer.executed))
            self.core_refused += [answer.id] if answer.status == "unsupported" else []
        check = answer.counts_as or check
        tally = self.tallies.setdefault(check, Tally())
        status = COUNTED_AS.get(answer.status, answer.status)
        tally.counts[status] += 1
        tally.seconds += answer.seconds
        tally.worst = max(tally.worst, answer.record.worst)
        if status == "unsupported":
            reason = answer.reason or ""
            alike = re.sub(r"\d+", "#", reason)  # one entry for messages that differ in sizes only
            self.reasons.setdefault(alike, reason)
            self.refused[alike].append(answer.id)
            tally.reasons[self.reasons[alike]] += 1
        elif status == "skipped":
            reason = why_skipped(answer)
            self.skipped[check, reason] += 1
            tally.reasons[reason] += 1
            if answer.status == "error":
                self.error = answer.reason
        else:
            self._take_executed(check, answer)
        if check != "property":
            self.listener.advance(check, status)

    def _take_executed(self, check: str, answer: Answer) -> None:
        self._note_power(answer)
        record, case = answer.record, parse_id(answer.judged)[2]
        self.executed.append(Planned(check, case))
        self.elements += record.elements
        self.histogram = [a + b for a, b in zip(self.histogram, record.histogram, strict=True)]
        for name, text in record.observations.items():
            self.heard[check, name][text] += 1
        findings = record.findings[:1]  # one failure per case; the others are mostly its consequences
        if answer.status == "died":
            findings = [Finding(answer.reason or "", float("inf"))]
        self.outcomes.append(Outcome(check, case, answer.judged, kind_of(findings[0].message) if findings else None))
        for finding in findings:
            self.fail(answer.judged, finding)

    def _note_power(self, answer: Answer) -> None:
        """Count data that were proved to judge, and name those that took the place of planned ones without power."""
        self.power["proved"] += bool(answer.rejected)
        if answer.judged != answer.id:
            self.power["replaced"].append({"case": answer.id, "by": answer.judged, "accepted": answer.accepted})
            self.places.setdefault(answer.judged, self.places.get(answer.id, len(self.places)))

    def fail(self, case_id: str, finding: Finding) -> None:
        """Enter one finding of a case as a failure."""
        failure = failure_of(case_id, finding, self.replay_line([case_id]))
        self.failures.append(failure)
        if len(self.failures) == 1:
            self.explain(failure)
        self.listener.failure(failure)

    def replay_line(self, case_ids: list[str]) -> str:
        """The command that judges these cases again."""
        device = f" --device {self.request.device}" if self.request.device != "cpu" else ""
        return f"moe-harness replay {shlex.join(case_ids)} --impl {shlex.quote(self.spec)}{device}"

    def place(self, failure: Failure) -> int:
        """Where a failure's case stands in the plan; failures are told in that order, not as they came."""
        return self.places.get(failure["case"], len(self.places))

    # --------------------------------------------------------------------------------------------------------- result

    def result(self, *, final: bool = True) -> Result:
        """What is known by now; only the final one has its failures put together, any other is marked as cut short."""
        self.failures.sort(key=self.place)
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
            "seconds": round(time.monotonic() - self.started, 2), "versions": self.loaded.versions,
            "declared": {k: v for k, v in self.loaded.declared.items() if k != "explicit"}, "error": self.error,
            "interrupted": self.interrupted or not final,
            "not_judged": [told for shape in self.request.configs if (told := shape.not_judged(self.stage))],
            "checks": [tally.as_check(name) for name, tally in self.tallies.items() if tally.counts],
            "judged": self._share(),
            "clusters": self.clusters() if final else [], "failures": self.failures, "coverage": self._coverage(),
            "statistics": {"z_histogram": {"edges": [*HISTOGRAM_EDGES, None], "counts": self.histogram,
                                           "limit": MAX_Z},
                           "elements": self.elements},
            "observations": self._observations(),
        }  # fmt: skip

    def _share(self) -> float:
        """Cases that were judged, as a share of those planned for this device."""
        elsewhere = sum(n for (_, why), n in self.skipped.items() if why == NEEDS_CUDA)
        met = sum(tally.counts.total() for tally in self.tallies.values())
        planned = max(met, len(self.planned)) - elsewhere
        return round(len(self.executed) / planned, 4) if planned else 0.0

    def clustered(self) -> list[Cluster]:
        """The failing cases by condition; asked for twice in a run, and the search takes up to a second."""
        if self._clustered is None or self._clustered[0] != len(self.outcomes):
            self._clustered = len(self.outcomes), cluster(self.outcomes)
        return self._clustered[1]

    def clusters(self) -> list[FailureCluster]:
        """What the run ends in: a few clusters, each with cause, condition, counts and its smallest case."""
        by_case = {failure["case"]: failure for failure in reversed(self.failures)}
        told: list[FailureCluster] = []
        for each in self.clustered():
            failures = [by_case[outcome.id] for outcome in each.failing if outcome.id in by_case]
            messages = [failure["message"] for failure in failures]
            told.append({
                "cause": cause_of(failures), "kinds": [words_of(kind, messages) for kind in each.kinds],
                "condition": None if each.condition is None else str(each.condition),
                "failed": len(each.failing), "passed": each.passing, "passed_without": each.others,
                "case": each.smallest.id, "replay": self.replay_line([each.smallest.id]),
            })  # fmt: skip
        return _by_cause(told)

    def _verdict(self) -> str:
        if self.failures:
            return "fail"
        if self.error or self.interrupted or self._left():
            return "error"
        if self._unjudged_worlds():
            return "unsupported"
        core = any(case.core() and case.rows() and check in self.core_checks for check, case in self.executed)
        if (core and self._core_is_whole()) or (self.executed and self.partial):
            return "pass"
        return "unsupported" if self.refused else "error"

    def _left(self) -> Counter[str]:
        """Planned cases of each check of which nothing was heard."""
        waiting = Counter(case_id.split("/")[1] for case_id in self.planned if case_id not in self.answered)
        return waiting + Counter({"property": self.to_draw})

    def _unjudged_worlds(self) -> list[str]:
        """Numbers of ranks over which every case was refused, where over others some were judged."""
        judged = {case.together() for _, case in self.executed if case.core() and case.rows()} if self.worlds else set()
        return [str(ranks) for ranks in self.worlds if ranks not in judged] if judged else []

    def _core_is_whole(self) -> bool:
        """Whether one part of the core, such as a dtype, was judged in all of its cases."""
        missing = {part for part, judged in self.core if not judged}
        return not self.core or any(part not in missing for part, _ in self.core)

    def _coverage(self) -> Coverage:
        axes: dict[str, Counter] = defaultdict(Counter)
        refused = sorted(self.refused.items(), key=lambda item: -len(item[1]))
        skipped = [*self.skipped.items(), *(((what, "not judged"), n) for what, n in self._left().items())]
        for _, case in self.executed:
            for f in fields(case):
                if f.name not in ("seed", "variant", "optional"):
                    axes[f.name][str(getattr(case, f.name)) or "contiguous"] += 1
        return {
            "executed": len(self.executed),
            "unsupported": [
                {"reason": self.reasons[alike], "cases": len(ids), "example": ids[0]} for alike, ids in refused
            ],
            "skipped": [{"what": what, "reason": why, "cases": n} for (what, why), n in skipped],
            "power": self.power,
            "axes": {name: dict(counts) for name, counts in axes.items()},
        }

    def _observations(self) -> list[dict[str, str]]:
        told = []
        if self.core_refused and not self._core_is_whole():
            many, first = len(self.core_refused), self.core_refused[0]
            told.append({"name": "core", "text": f"{many} cases that nobody needs to refuse were refused, as {first}"})
        for (_, name), counts in self.heard.items():
            if set(counts) <= {"all equal", "differ"}:
                told.append({"name": name, "text": f"bits equal in {counts['all equal']} of {counts.total()} cases"})
            else:
                told += [{"name": name, "text": text} for text in counts]
        if (missing := self._unjudged_worlds()) and self._verdict() == "unsupported":
            told.append(
                {"name": "worlds", "text": f"no case was judged over {', '.join(missing)} ranks, all were refused"}
            )
        return told
