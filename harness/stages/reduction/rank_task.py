"""What one rank does for a case of the stage `reduction`: hand over its parts, compare what comes out with the layer.

    reduction(routed [T, H], shared [T, H] | None, group, *, routed_state, shared_state=None, rows=None)

The parts (`data`) have exact sums in any order: the result has to have the very bits of the layer on one rank.  Every
case is three calls, of which no one's result may change with the next: memory that is kept, one buffer or two in turn,
is right once.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.findings import RankReport
from moe_harness.harness.core.memory import Arena
from moe_harness.harness.core.ranked_subject import load_checked
from moe_harness.harness.core.ranked_task import (
    Rank,
    Refused,
    differing_rows,
    enter,
    member_of_group,
    same_bits,
    wrong_rows,
)
from moe_harness.harness.stages.reduction.cases import ReductionCase
from moe_harness.harness.stages.reduction.data import parts_of, value_of
from moe_harness.harness.stages.reduction.faults.reductions import fit, name_fit, narrowed
from moe_harness.reference.reduction import Placed

CALLS = (0, 5003, 10007)  # what is added to the seed for each


def run(me: Rank, spec: dict[str, str], seed: int) -> RankReport:
    """Task: spec = {"impl": ..., "case": id}.  Returns a RankReport."""
    _, _, case = parse_id(spec["case"])
    assert isinstance(case, ReductionCase)
    subject, report = load_checked("reduction", spec["impl"]), RankReport(me.rank)
    here = member_of_group(me, case.groups)
    try:
        _judge(here, subject, case, report)
    except Refused as refusal:
        report.rejected = str(refusal)
    return report


def _judge(me: Rank, subject: Any, case: ReductionCase, report: RankReport) -> None:
    results = []
    for number in CALLS:
        routed, shared = parts_of(case.but(seed=case.seed + number))
        out = _call(me, subject, case, routed, shared, report)
        kept = out.clone() if isinstance(out, Tensor) else out
        results.append((out, kept, routed, shared))
    if not all(same_bits(out, kept) for out, kept, _, _ in results):
        report.fail("inputs", "the result of one call was changed by the next call")
    for call in me.recorder.started.values():
        report.fail("contract", f"call {call}: started and never waited for, so that its result may come too late")
    for number, (_, kept, routed, shared) in enumerate(results):
        which = f"call {number + 1} of {len(results)}: " if number else ""
        if not _compare(me, kept, routed, shared, case, report, which):
            return


def _call(
    me: Rank, subject: Any, case: ReductionCase, routed: Placed, shared: Placed | None, report: RankReport
) -> Any:
    """The result of one call, whose inputs are looked at afterwards."""
    arena, laid_out = Arena(), dict([case.layout.split(":")] if case.layout else [])
    given = []
    for name, part in (("routed", routed), ("shared", shared)):
        values = None if part is None else part.parts[me.rank].to(DTYPES[case.dtype]).to(me.device)
        given.append(None if values is None else arena.place(name, values, laid_out.get(name, "contiguous")))
    rows = list(case.tokens) if case.sequence else None
    keywords = {"routed_state": case.routed, "shared_state": None if shared is None else case.shared}
    out = enter(me, subject, *given, me.group, **keywords, rows=rows)
    for name, what in arena.violations():
        report.fail("inputs", f"{name} {what}")
    if rows is not None and rows != case.tokens:
        report.fail("inputs", f"rows was modified: it is {rows}, but was {case.tokens}")
    if isinstance(out, Tensor) and (shared_with := arena.aliased_by(out)):
        report.fail("inputs", f"the result shares memory with {shared_with}, but should be a new tensor")
    return out


def _compare(
    me: Rank, out: Any, routed: Placed, shared: Placed | None, case: ReductionCase, report: RankReport, which: str
) -> bool:
    """Whether a result is the layer's on one rank."""
    routed_value, shared_value = value_of(routed, me.rank, case), value_of(shared, me.rank, case)
    expected, before = torch.as_tensor(routed_value + shared_value), len(report.findings)
    out = _not_finite_as_expected(out, expected)
    wrong = wrong_rows(out, expected, DTYPES[case.dtype], report)
    if not len(wrong):
        return len(report.findings) == before
    got = out.cpu().double()
    token = int(wrong[0])
    column = int(differing_rows(got[token, :, None], expected[token, :, None])[0])
    zero = torch.zeros_like(expected)
    report.fail(
        "reduction",
        f"{which}rank {me.rank}: {len(wrong)} of {len(expected)} tokens differ from the layer on one rank; first is "
        f"token {token}, column {column}: {got[token, column]:g}, but should be {expected[token, column]:g}",
        where={"rank": me.rank, "token": token, "column": column},
        diagnosis=_causes(got, zero + routed_value, zero + shared_value, case),
    )
    return False


def _not_finite_as_expected(out: Any, expected: Tensor) -> Any:
    """NaN is as good as an infinity in its place: no contract forbids a product with 0 or 1 on the way."""
    if not isinstance(out, Tensor) or out.shape != expected.shape or not bool(expected.isinf().any()):
        return out
    return torch.where(expected.isinf().to(out.device) & out.isnan(), expected.to(out.device, out.dtype), out)


def _causes(got: Tensor, routed: Tensor, shared: Tensor, case: ReductionCase) -> list[dict[str, str]]:
    """What the finite elements say, or those that are not."""
    expected, dtype = routed + shared, DTYPES[case.dtype]
    here = got.isfinite() & expected.isfinite()
    if told := narrowed(got, expected, dtype) or _not_finite(got, expected, here):
        return told
    if not bool(here.any()):
        return []
    a, b, residual = fit(got[here], routed[here], shared[here])
    evidence = f"output = {a:.4g} * routed + {b:.4g} * shared leaves {residual:.2g} of it unexplained"
    return [{"fault": name_fit(a, b, residual, case.members, torch.finfo(dtype).eps), "evidence": evidence}]


def _not_finite(got: Tensor, expected: Tensor, here: Tensor) -> list[dict[str, str]]:
    """Where all that is finite is right."""
    if bool((got != expected)[here].any()):
        return []
    lost, spread = (
        int((got.isfinite() & ~expected.isfinite()).sum()),
        int((~got.isfinite() & expected.isfinite()).sum()),
    )
    fault = "an infinity is replaced" if lost else "an infinity spreads, as by a product with 0"
    return [{"fault": fault, "evidence": f"{lost} infinite elements came out finite, {spread} finite ones did not"}]
