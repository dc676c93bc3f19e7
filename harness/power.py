"""The power of a data set: which standard wrong outputs the judge would accept on it.  A judge needs none."""

from typing import Any

from torch import Tensor

from harness.cases import Case
from harness.compare import against_bound, exactly
from harness.findings import Record
from harness.rounding import Bound
from harness.stages import stage_module
from harness.stages.call import DTYPES, Call
from harness.wrong_outputs import wrong_outputs


def power(call: Call, bound: Bound | None = None, declared: tuple[str, ...] | None = None) -> list[str]:
    """Names of the wrong outputs that pass the judge's own comparison; empty on powerful data.

    Args:
        bound: what a right result may be, where it is known already; the router and exact data need none.
        declared: the permitted roundings, None for the permissive set.
    """
    return [name for name, wrong in wrong_outputs(call).items() if not _judged(call, wrong, bound, declared).findings]


def power_of(case: Case, device: str = "cpu") -> list[str]:
    """As `power`, of a case as it is planned."""
    return power(stage_module(case.stage).build(case, device))


def _judged(call: Call, wrong: Any, bound: Bound | None, declared: tuple[str, ...] | None) -> Record:
    stage = stage_module(call.case.stage)
    if isinstance(wrong, tuple):
        weights, ids = wrong
        return stage.compare(call, (weights.float(), ids), declared)
    result = _as_output(stage, call, wrong)
    if call.case.data == "exact":
        return exactly(stage, call, stage.exact_value(call), result)
    return against_bound(stage, call, bound or stage.expect(call, declared), result)


def _as_output(stage: Any, call: Call, wrong: Tensor) -> Tensor:
    """In the shape and dtype an implementation would return it in."""
    _, shape, _ = stage.outputs(call)[0]
    return wrong.reshape(shape).to(DTYPES[call.case.dtype])
