"""Operands that are right at the start of memory of their own and wrong elsewhere: offsets that a kernel ignores."""

from torch import Tensor

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.memory import poisoned_allocations
from moe_harness.harness.diagnosis.datasets import probes


def ignored_offsets(trial: Trial, case: Case) -> list[str]:
    """The tensors whose storage offset is ignored, in one sentence; [] where all are respected.

    All operands of the judge lie within larger memory, so that a kernel that reads from the start of the storage is
    wrong in every call.
    """
    first = next((dataset.cases[0] for dataset in probes(case)), None)
    if first is None or _is_right(trial, first, frozenset()):
        return []
    names = [name for name, value in trial.build(first).args.items() if isinstance(value, Tensor)]
    if not _is_right(trial, first, frozenset(names)):
        return []
    ignored = [name for name in names if not _is_right(trial, first, frozenset(names) - {name})]
    told = ", ".join(ignored) or "several tensors"
    why = "a storage offset is ignored (data_ptr() of the tensor holds it, that of its storage does not)"
    return [f"the result is right once {told} begins where its storage begins: {why}"]


def _is_right(trial: Trial, case: Case, alone: frozenset[str]) -> bool:
    """Whether a call is right whose operands `alone` begin at the start of memory of their own."""
    call = trial.build(case)
    call.args.update({name: call.args[name].clone() for name in alone})
    try:
        with poisoned_allocations(trial.device):
            return not trial.judge(call, trial.invoke(call)).findings
    except (Rejected, Broken):
        return False
