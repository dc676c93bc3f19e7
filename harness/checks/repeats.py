"""Same call, same bits; same row, same bits.  Judged where declared, reported otherwise."""

import torch

from moe_harness.harness.checks.memory import copies, same_bits
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Rejected, Trial
from moe_harness.harness.core.laws import terms
from moe_harness.harness.core.memory import poisoned_allocations

REPETITIONS = 6


def determinism(trial: Trial, case: Case) -> Record:
    """Repeat a call, with other memory in between."""
    record, call = Record(), trial.build(case)
    first = copies(trial.invoke(call))
    equal = 0
    for turn in range(REPETITIONS):
        with poisoned_allocations(trial.device):
            ballast = [torch.empty(1 + 997 * turn, device=trial.device) for _ in range(3)]
            equal += same_bits(first, trial.invoke(trial.again(call)))
            del ballast
    _report(record, "determinism", trial.subject.declared.deterministic, "deterministic", equal, REPETITIONS,
            "repetitions")  # fmt: skip
    return record


def batch_invariance(trial: Trial, case: Case) -> Record:
    """Rows of a batch against the same rows alone."""
    record = Record()
    rows = equal = 0
    for turn in range(5):
        call = trial.build(case)
        call.case = case.but(seed=case.seed + turn)  # only the row that is picked changes
        try:
            together, alone = _together_and_alone(trial, call)
        except Rejected:
            if turn == 0:
                raise
            continue
        rows += 1
        equal += same_bits(together, alone)
    _report(record, "batch invariance", trial.subject.declared.batch_invariant, "batch_invariant", equal, rows, "rows")
    return record


def _together_and_alone(trial: Trial, call: Call) -> tuple:
    first, second = terms(call.case.stage, "row_alone", call)
    return first.rows(trial.invoke(first.call)), second.rows(trial.invoke(second.call))


def _report(record: Record, name: str, declared: bool, attribute: str, equal: int, count: int, what: str) -> None:
    record.observations[name] = "all equal" if equal == count else "differ"
    if declared and equal < count:
        record.fail(
            f"is declared {attribute}, but only {equal} of {count} {what} have the same bits", headroom=float("inf")
        )
