"""Relations between results that hold without a reference."""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import ACCUMULATOR, Bound, permitted, score_error
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.compare import against_bound
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.laws import terms
from moe_harness.harness.stages.router import laws as router_laws


def laws(trial: Trial, case: Case) -> Record:
    """The law that the case's variant names."""
    call = trial.build(case)
    record = _router_law(trial, call) if case.stage == "router" else _linear_law(trial, call)
    told = "" if case.stage == "router" else "what should cancel does not: "
    for finding in record.findings:
        finding.message = f"the law {case.variant} does not hold: {told}{finding.message}"
        finding.where["law"] = case.variant
    return record


def _linear_law(trial: Trial, call: Call) -> Record:
    """The sum of the terms against zero, with the variance of the sum."""
    stage, declared = trial.stage, trial.subject.declared.rounds
    sums: list[Tensor] = []  # of the results, of their variances, of what is shared between elements, of their drifts
    for term in terms(call.case.stage, call.case.variant, call):
        result = trial.invoke(term.call)
        bound = stage.expect(term.call, declared)
        parts = [term.coefficient * term.rows(result.double())]
        parts += [term.coefficient**2 * term.rows(v) for v in (bound.variance, bound.shared)]
        if bound.drift is not None:  # the terms need not be computed one way, so each lies anywhere in its own
            low_and_high = sorted((0, 1), reverse=term.coefficient < 0)
            parts += [term.coefficient * term.rows(bound.drift[end]) for end in low_and_high]
        of_term = term.rows(bound.sources.reshape(*bound.value.shape[:-1], 2))
        if not sums:
            sums, sources = parts, of_term
        else:
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
            sources = torch.minimum(sources, of_term)
    residual, variance, shared, *drift = sums
    own = sources.reshape(-1, 2).clamp(min=1)
    nothing = Bound(torch.zeros_like(residual), variance, shared, own, torch.stack(drift) if drift else None)
    return against_bound(_Rows, call, nothing, residual)


class _Rows:
    """Names the rows of a relation, which need not be those of any one call."""

    @staticmethod
    def place_of(call: Call, row: int, column: int) -> dict[str, int]:
        return {"row": row, "column": column}

    @staticmethod
    def row_groups(call: Call) -> dict[str, Tensor]:
        return {}


def _router_law(trial: Trial, call: Call) -> Record:
    law = getattr(router_laws, call.case.variant)(call)
    first, second = trial.invoke(law.first), trial.invoke(law.second)
    record = trial.judge(law.first, first)
    record.merge(trial.judge(law.second, second), "the changed call: ")
    if record.findings:
        return record
    same, difference = router_laws.disagreement(tuple(r[law.rows] for r in first), law.back(second))
    keywords = law.first.keywords
    of_scores = max(
        float(score_error(c.args["router_logits"], keywords["scoring"]).max()) for c in (law.first, law.second)
    )
    dtypes = [first[0].dtype]
    if "routing_weight" in permitted(trial.subject.declared.rounds):
        dtypes.append(call.args["router_logits"].dtype)
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    limit = 4 * of_scores + 2 * (keywords["top_k"] + 4) * ACCUMULATOR + unit
    used = torch.where(same, difference / limit, 0.0)
    record.worst = max(record.worst, float(used.max()))
    if record.worst > 1:
        row = int(used.argmax())
        record.fail(f"the weights of row {row} differ by {float(difference[row]):.3g} of their size, limit {limit:.3g}",
                    headroom=float(used.max()), where={"token": row})  # fmt: skip
    return record
