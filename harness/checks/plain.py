"""One call, judged against its bound, with the memory around it watched."""

from harness.cases import Case
from harness.contracts import SIGNATURES
from harness.findings import Record
from harness.stages.call import Call
from harness.trial import Trial


def plain(trial: Trial, case: Case) -> Record:
    """Call once and judge the result and the operands' memory."""
    return judged_call(trial, trial.build(case))


def contract(trial: Trial, case: Case) -> Record:
    """As `plain`; for the variant "defaults" without the keywords that have their default value."""
    call = trial.build(case)
    if case.variant == "defaults":
        parameters = SIGNATURES[case.stage].parameters
        call.keywords = {k: v for k, v in call.keywords.items() if v != parameters[k].default}
    result = trial.invoke(call)
    call.keywords = trial.build(case).keywords | call.keywords
    record = trial.judge(call, result)
    watch(call, record)
    return record


def judged_call(trial: Trial, call: Call) -> Record:
    record = trial.judge(call, trial.invoke(call))
    watch(call, record)
    return record


def watch(call: Call, record: Record) -> None:
    """Add a finding for every operand that is no longer bit for bit what it was, or was written around."""
    for operand, what in call.arena.violations():
        record.fail(f"the input {operand} {what}, but no input may be written", headroom=float("inf"),
                    where={"operand": operand}, looks_like=["the kernel works in place or writes out of bounds"])  # fmt: skip
