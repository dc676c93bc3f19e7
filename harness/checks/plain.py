"""One call, judged against its bound."""

from contextlib import nullcontext

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import SIGNATURES
from moe_harness.harness.core.findings import Record
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.memory import poisoned_allocations


def plain(trial: Trial, case: Case) -> Record:
    """Call once and judge the result; the variant "poisoned" in fresh memory full of NaN."""
    with poisoned_allocations(trial.device) if case.variant == "poisoned" else nullcontext():
        return judged_call(trial, trial.build(case))


def contract(trial: Trial, case: Case) -> Record:
    """As `plain`; for the variant "defaults" without the keywords that have their default value."""
    call = trial.build(case)
    if case.variant == "defaults":
        parameters = SIGNATURES[case.stage].parameters
        call.keywords = {k: v for k, v in call.keywords.items() if v != parameters[k].default}
    result = trial.invoke(call)
    call.keywords = trial.build(case).keywords | call.keywords
    return trial.judge(call, result)


def judged_call(trial: Trial, call: Call) -> Record:
    """Call and judge."""
    return trial.judge(call, trial.invoke(call))
