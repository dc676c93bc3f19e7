"""Relations between results that hold without a reference."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import Bound
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.compare import PlainRows, against_bound
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.laws import Term, terms


def laws(trial: Trial, case: Case) -> Record:
    """The law that the case's variant names."""
    call = trial.build(case)
    judge = getattr(trial.stage.part("laws"), "judge", _judge_sum)
    record = judge(trial, call, terms(case.stage, case.variant, call))
    for finding in record.findings:
        finding.message = f"the law {case.variant} does not hold: {finding.message}"
        finding.where["law"] = case.variant
    return record


def _judge_sum(trial: Trial, call: Call, of_law: list[Term]) -> Record:
    """The sum of the terms against zero, with the variance of the sum."""
    stage, declared = trial.stage, trial.subject.declared.rounds
    sums: list[Tensor] = []  # of the results, of their variances, of what is shared between elements, of their drifts
    for term in of_law:
        result = _output(trial.invoke(term.call), term)
        bound = _output(stage.expect(term.call, declared), term)
        parts = [term.coefficient * term.rows(result.double())]
        parts += [term.coefficient**2 * term.rows(v) for v in (bound.variance, bound.shared)]
        if bound.drift is not None:  # the terms need not be computed one way, so each lies anywhere in its own
            one, other = (term.coefficient * term.rows(end) for end in bound.drift)
            parts += [torch.minimum(one, other), torch.maximum(one, other)]
        of_term = term.rows(bound.sources.reshape(*bound.value.shape[:-1], 2))
        if not sums:
            sums, sources = parts, of_term
        else:
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
            sources = torch.minimum(sources, of_term)
    residual, variance, shared, *drift = sums
    own = sources.reshape(-1, 2).clamp(min=1)
    nothing = Bound(torch.zeros_like(residual), variance, shared, own, torch.stack(drift) if drift else None)
    record = against_bound(PlainRows(), call, nothing, residual)
    for finding in record.findings:
        finding.message = f"what should cancel does not: {finding.message}"
    return record


def _output(yielded: Any, term: Term) -> Any:
    """The output, or the bound of it, that the term is about."""
    return yielded[term.output] if isinstance(yielded, tuple) else yielded
