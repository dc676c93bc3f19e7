"""What one rank does for a case of the stage `reduction`: hand over its parts, compare what comes out with the layer.

    reduction(routed [T, H], shared [T, H] | None, group, *, routed_state, shared_state=None, rows=None)

The parts are small integers, so that routed + shared is exact in every dtype and in any order: the result has to have
the very bits of the layer on one rank.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.findings import RankReport
from moe_harness.harness.core.ranked_subject import load_checked
from moe_harness.harness.core.ranked_task import (
    Rank,
    Refused,
    differing_rows,
    enter,
    member_of_group,
    wrong_rows,
)
from moe_harness.harness.stages.reduction.cases import ReductionCase
from moe_harness.harness.stages.reduction.faults.reductions import fit, name_fit
from moe_harness.reference.reduction import Partial, Placed, Replicated, Sharded

SECOND = 5003  # added to the seed for a second call, whose result must not touch the first one's


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
    for number in (0, SECOND):
        routed, shared = parts_of(case.but(seed=case.seed + number))
        out = _call(me, subject, case, routed, shared, report)
        kept = out.clone() if isinstance(out, Tensor) else out
        results.append((out, kept, routed, shared))
    out, kept, routed, shared = results[0]
    if isinstance(out, Tensor) and not torch.equal(out.cpu().view(torch.uint8), kept.cpu().view(torch.uint8)):
        report.fail("inputs", "the result of one call was changed by the next call")
    for call in me.recorder.started.values():
        report.fail("contract", f"call {call}: started and never waited for, so that its result may come too late")
    _compare(me, kept, routed, shared, case, report)


def _call(
    me: Rank, subject: Any, case: ReductionCase, routed: Placed, shared: Placed | None, report: RankReport
) -> Any:
    """The result of one call, whose inputs are looked at afterwards."""
    dtype = DTYPES[case.dtype]
    given = [None if part is None else part.parts[me.rank].to(dtype).to(me.device) for part in (routed, shared)]
    before = [None if tensor is None else tensor.clone() for tensor in given]
    keywords = {"routed_state": case.routed, "shared_state": None if shared is None else case.shared}
    out = enter(me, subject, *given, me.group, **keywords, rows=case.tokens if case.sequence else None)
    for name, tensor, original in zip(("routed", "shared"), given, before, strict=True):
        if tensor is None or original is None:
            continue
        if not torch.equal(tensor.view(torch.uint8), original.view(torch.uint8)):
            report.fail("inputs", f"{name} was modified")
        same = isinstance(out, Tensor) and out.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if same and tensor.numel():
            report.fail("inputs", f"the result shares memory with {name}, but should be a new tensor")
    return out


def parts_of(case: ReductionCase) -> tuple[Placed, Placed | None]:
    """Routed and shared part of all ranks of a group, in fp64."""
    random = torch.Generator().manual_seed(case.seed)
    own = case.routed == "complete" and (case.sequence or case.shared in ("none", "complete"))
    routed = _placed(case, case.routed, own, random)
    shared = None if case.shared == "none" else _placed(case, case.shared, case.shared == "complete" and own, random)
    return routed, shared


def _placed(case: ReductionCase, state: str, own: bool, random: torch.Generator) -> Placed:
    """Parts in `state`: of each rank's own rows, or of all rows."""
    counts = case.tokens if own else [sum(case.tokens)] * case.members
    parts = [torch.randint(-4, 5, (count, case.H), generator=random).double() for count in counts]
    if state == "partial":
        return Partial.of(parts)
    return Sharded.of(parts) if own else Replicated.of(parts[:1] * case.members)


def _value(placed: Placed | None, rank: int, case: ReductionCase) -> Tensor | float:
    """What `rank` should hold of a part in the end."""
    if placed is None:
        return 0.0
    if isinstance(placed, Sharded):
        return placed.parts[rank]
    whole = placed.value()  # type: ignore[attr-defined]
    return whole.split(case.tokens)[rank] if case.sequence else whole


def _compare(
    me: Rank, out: Any, routed: Placed, shared: Placed | None, case: ReductionCase, report: RankReport
) -> None:
    routed_value, shared_value = _value(routed, me.rank, case), _value(shared, me.rank, case)
    expected = torch.as_tensor(routed_value + shared_value)
    wrong = wrong_rows(out, expected, DTYPES[case.dtype], report)
    if not len(wrong):
        return
    got = out.cpu().double()
    token = int(wrong[0])
    column = int(differing_rows(got[token, :, None], expected[token, :, None])[0])
    zero = torch.zeros_like(expected)
    a, b, residual = fit(got, zero + routed_value, zero + shared_value)
    report.fail(
        "reduction",
        f"rank {me.rank}: {len(wrong)} of {len(expected)} tokens differ from the layer on one rank; first is token "
        f"{token}, column {column}: {got[token, column]:g}, but should be {expected[token, column]:g}",
        where={"rank": me.rank, "token": token, "column": column},
        diagnosis=[{"fault": name_fit(a, b, residual, case.members), "evidence": _evidence(a, b, residual)}],
    )


def _evidence(a: float, b: float, residual: float) -> str:
    return f"output = {a:.4g} * routed + {b:.4g} * shared leaves {residual:.2g} of it unexplained"
