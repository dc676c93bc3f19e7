"""The judgement of the stages that run on many ranks, from the controller's side.  Imports no torch.

verdict = judge("dispatchers:all_to_all", "dispatcher/dense/R=2,E=3,k=1,T=0+2")
verdict.findings       what each is `about`, its message, where, headroom, diagnosis
verdict.unsupported    why every rank refused the case, or None
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_harness.harness.core import blame, errors
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.contracts import OVER_RANKS, check_stage
from moe_harness.harness.core.findings import Answer, Finding, RankReport, Record
from moe_harness.harness.core.ranked_cases import one_of
from moe_harness.harness.core.ranked_stage import find_ranked, plan_over_ranks
from moe_harness.harness.core.registry import PACKAGE
from moe_harness.harness.ranks import pool
from moe_harness.harness.ranks.calls import RecordedCall
from moe_harness.harness.ranks.failure import RankFailure
from moe_harness.harness.ranks.jobs import Injection


@dataclass(frozen=True)
class Verdict:
    """What became of one case; passed where there are no findings and nobody refused."""

    case: str
    findings: list[Finding] = field(default_factory=list)
    unsupported: str | None = None
    failure: RankFailure | None = None
    observed: list[dict[str, Any]] = field(default_factory=list)  # one per rank
    traces: list[list[RecordedCall]] = field(default_factory=list)
    seconds: float = 0.0
    left: tuple[str, ...] = ()  # processes that the implementation had left running, ended with the ranks

    @property
    def passed(self) -> bool:
        return not self.findings and self.unsupported is None

    def answer(self, counts_as: str = "") -> Answer:
        """The verdict as what a run takes."""
        status = "failed" if self.findings else "passed" if self.unsupported is None else "unsupported"
        record = Record()
        for finding in self.findings:
            record.add(replace(finding, headroom=finding.headroom or float("inf")))
        return Answer(self.case, status, self.unsupported, self.seconds, record, counts_as=counts_as)


def judge(
    spec: str, case: str, *, backend: str = "gloo", injection: Injection | None = None, budget: float = pool.BUDGET
) -> Verdict:
    """Run the implementation `spec` on `case` ("stage/check/fields") over as many ranks as the case says.

    Raises:
        UsageError, CannotJudge: the case or the implementation cannot be found or imported.
    """
    stage, check, parsed = parse_id(case)
    one_of("check", check, find_ranked(check_stage(stage, OVER_RANKS)).checks)
    ranks: int = parsed.R  # type: ignore[attr-defined]
    name, task, load = task_of(stage), {"impl": spec, "case": case}, (stage, spec)
    outcome = pool.run(name, task, ranks=ranks, backend=backend, injection=injection, budget=budget, load=load)
    _raise_not_theirs(outcome.failure)
    reports: list[RankReport] = [result for result in outcome.results if result is not None]
    findings = [finding for report in reports for finding in report.findings]
    findings.sort(key=lambda finding: finding.about not in ("contract", "inputs"))  # others may follow from these
    refused = {report.rank: report.rejected for report in reports if report.rejected is not None}
    unsupported = None
    if len(refused) == ranks or (refused and parsed.optional):  # outside the contract one rank may refuse for all
        unsupported, findings = next(iter(refused.values())), []
    elif refused:
        findings.insert(0, _refused_alone(refused, ranks))
    elif outcome.failure is not None and not _stopped_by_findings(outcome.failure, reports):
        _raise_usage(outcome.failure)
        findings.insert(0, _from_failure(outcome.failure))
    elif outcome.ok and (across := find_ranked(stage).across) is not None:
        seen = [replace(finding, about=check) for finding in across([report.observed for report in reports])]
        findings = [*seen, *findings]
    explained = bool(findings) and findings[0].about == "inputs"
    if findings and outcome.ok and not refused and (plain := _plain_everywhere(reports)):  # all have their result
        findings[0].diagnosis, explained = plain, True
    if findings and not explained and outcome.ok and stage == "dispatcher" and injection is None:
        again = pool.run(name, {**task, "explain": True}, ranks=ranks, backend=backend, budget=budget)
        findings[0].diagnosis += _received(again.results)
    observed = [report.observed for report in reports]
    return Verdict(case, findings, unsupported, outcome.failure, observed, outcome.traces, outcome.seconds,
                   outcome.left)  # fmt: skip


def planned(
    stage: str, spec: str, worlds: Sequence[int], *, profile: str = "quick", seed: int = 0, backend: str = "gloo"
) -> list[str]:
    """Ids of the cases that `spec` is judged on over these numbers of ranks.

    Raises:
        UsageError, CannotJudge: the stage or the implementation cannot be found, or is of no known kind.
    """
    traits = traits_of(check_stage(stage, OVER_RANKS), spec, backend)
    plan = plan_over_ranks(stage, worlds, profile=profile, seed=seed, **traits)
    return [planned.id for planned in plan]


def traits_of(stage: str, spec: str, backend: str = "gloo") -> dict[str, Any]:
    """What the plan has to know of an implementation.

    Raises:
        UsageError, CannotJudge: it cannot be found, or is of no known kind.
    """
    return _asked(task_of(stage, "traits"), stage, spec, backend) if find_ranked(stage).has_traits else {}


def task_of(stage: str, name: str = "run") -> str:
    """What runs on every rank."""
    return f"{PACKAGE}.{stage}.rank_task:{name}"


def _asked(task: str, stage: str, spec: str, backend: str) -> Any:
    """What one rank says of an implementation, which is loaded there.

    Raises:
        UsageError, CannotJudge: it cannot be.
    """
    outcome = pool.run(task, {"impl": spec}, ranks=1, backend=backend, load=(stage, spec))
    if outcome.failure is None:
        return outcome.results[0]
    _raise_not_theirs(outcome.failure)
    _raise_usage(outcome.failure)
    raise errors.CannotJudge(f"{spec}: {outcome.failure.headline()}")


def _raise_not_theirs(failure: RankFailure | None) -> None:
    """What the machine lacks, and what the judge itself does wrong, is no finding about an implementation."""
    if failure is not None and failure.kind == "machine":
        raise errors.CannotJudge(blame.out_of(f"rank {failure.rank}: {failure.cause}"))
    if failure is not None and failure.kind == "missing":
        raise errors.CannotJudge(failure.cause)
    if failure is not None and failure.kind == "judge":
        raise errors.CannotJudge(f"the harness failed on rank {failure.rank}: {failure.cause}\n{failure.trace}")


def _raise_usage(failure: RankFailure) -> None:
    """An implementation that cannot be found or imported is no finding about it."""
    kind, _, message = failure.cause.partition(": ")
    error = {"UsageError": errors.UsageError, "CannotJudge": errors.CannotJudge}.get(kind)
    if failure.kind == "raised" and error is not None:
        raise error(message)


def _stopped_by_findings(failure: RankFailure, reports: list[RankReport]) -> bool:
    """Whether the others only wait because this rank broke the contract and was judged no further."""
    stopped = {r.rank for r in reports if any(f.about == "contract" for f in r.findings)}
    return failure.kind == "deadlock" and failure.rank in stopped


def _plain_everywhere(reports: list[RankReport]) -> list[dict[str, str]]:
    """The name of results that say nothing of how they were computed, where that of every rank has it."""
    told = [one for report in reports for one in report.observed.get("plain", [])]
    return told[0] if told and all(one == told[0] for one in told) else []


def _received(results: list[RankReport | None]) -> list[dict[str, str]]:
    """What each rank found odd about the rows that came to it."""
    statements = [s for result in results if result is not None for s in result.observed.get("received", [])]
    return statements[:6]


def _refused_alone(refused: dict[int, str], ranks: int) -> Finding:
    ones = ", ".join(f"rank {rank} raises {message.splitlines()[0]}" for rank, message in sorted(refused.items()))
    others = [rank for rank in range(ranks) if rank not in refused]
    message = f"{ones}, but ranks {others} go on; an implementation that needs more has to raise on every rank"
    return Finding(message, where={"rank": min(refused)}, about="refusal")


def _from_failure(failure: RankFailure) -> Finding:
    # What the other ranks told follows from it: no cause, so none of `diagnosis`, whose first entry names a cluster.
    beside = [f"elsewhere, {line}" for line in failure.secondary]
    where = {"rank": failure.rank, "call": failure.call}
    return Finding(f"{failure.kind}: {failure.headline()}", where=where, looks_like=beside, about="ranks")
