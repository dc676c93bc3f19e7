"""Outputs that say nothing of the way they were computed: all NaN, all zero, one value everywhere, an input copied.

Many faults of the catalogue give one of these on some call, and so does a kernel that was never launched, a grid of no
programs, or a buffer that is returned before it is written.  What is plain in every call has that name and no other.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.memory import allocations_of_zeros, poisoned_allocations
from moe_harness.harness.diagnosis.datasets import Dataset, probes

LOOKED_AT = 8  # probes, of which the first differ in every size
ENOUGH = 3  # other calls that are as plain
UNTOLD = "untold"

ADVICE = {
    "all_nan": "Every element is NaN, as memory is that nobody has written: look at the launch (a grid of no programs, "
    "an error that nobody checks) and at what is returned. Where it was written, a NaN was computed",
    "all_zeros": "Every element is zero: look at whether the buffer that is filled is the one that is returned, and "
    "at masks that leave nothing",
    "constant_output": "Every element is one value: no argument reaches the result",
    "input_copied": "The result is the argument {} as it was given: nothing was computed, or not into the tensor that "
    "is returned",
}
COMPUTED = (
    "Every element is NaN, also where unwritten memory holds zeros: a NaN is computed, as by inf * 0, or by a scale "
    "whose exponent wraps in the arithmetic of bytes"
)


def always_plain(trial: Trial, case: Case) -> list[dict[str, str]]:
    """The plain name where the result of the failing case has one and so have those of other calls; else []."""
    name, operand = _of_call(trial, case)
    if name not in ADVICE:
        return []
    seen: list[Dataset] = []
    for dataset in islice(probes(case), LOOKED_AT):  # of other shapes: a launch may fail for one of them alone
        if len(seen) == ENOUGH:
            break
        found, _ = _of_call(trial, dataset.cases[0])
        if found is None:
            return []
        seen += [dataset] if found == name else []
    told = f"; so in {len(seen)} calls of other shapes and data" if len(seen) == ENOUGH else ""
    return [{"fault": name, "evidence": _advice(trial, case, name).format(operand) + told}] if told else []


def plain_here(trial: Trial, case: Case) -> list[dict[str, str]]:
    """The plain name of a failing result that is one tensor, where other calls have other results."""
    name, operand = _of_call(trial, case)
    if name not in ADVICE or len(trial.stage.outputs(trial.build(case))) > 1:
        return []
    return [{"fault": name, "evidence": f"{_advice(trial, case, name).format(operand)}; not so in every call"}]


def _advice(trial: Trial, case: Case, name: str) -> str:
    """Words on where to look; of NaN, whether they are what fresh memory was made to hold."""
    if name != "all_nan":
        return ADVICE[name]
    with allocations_of_zeros():
        found = trial.invoke(trial.build(case.once()))
    first = found[0] if isinstance(found, tuple) else found
    return COMPUTED if bool(first.isnan().all()) else ADVICE[name]


def kind(out: Tensor, inputs: dict[str, Any]) -> tuple[str | None, str]:
    """(the plain name of a floating-point result or None, the input that was copied or "")."""
    if not out.numel() or not out.is_floating_point():
        return None, ""
    if bool(out.isnan().all()):
        return "all_nan", ""
    if bool((out == 0).all()):
        return "all_zeros", ""
    if out.numel() > 1 and bool((out == out.flatten()[0]).all()):
        return "constant_output", ""
    for name, given in inputs.items():
        alike = isinstance(given, Tensor) and given.shape == out.shape and given.dtype == out.dtype
        if alike and out.numel() > 1 and torch.equal(given.nan_to_num(), out.nan_to_num()):
            return "input_copied", name
    return None, ""


def _of_call(trial: Trial, case: Case) -> tuple[str | None, str]:
    """The plain name of one call's wrong result; None where it is another one, UNTOLD where the call tells nothing."""
    try:
        call = trial.build(case.once())
        with poisoned_allocations(trial.device):
            result = trial.invoke(call)
        wrong = bool(trial.judge(call, result).findings)
    except (Rejected, Broken, RuntimeError, ValueError, IndexError):  # refused, or a shape without data of this kind
        return UNTOLD, ""
    first = result[0] if isinstance(result, tuple) else result
    name, operand = kind(first, call.args)
    return (name, operand) if wrong or name is None else (UNTOLD, "")  # zeros that are right, as of masked slots
