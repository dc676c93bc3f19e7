"""Every fault of the stage shows in its own example, to the judge itself, and is hidden where it says so."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.contracts import REJECTIONS, load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.candidates import forget
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase

FAULTS = all_faults("quantized_experts")


def killed(fault: Fault, case: QuantizedCase) -> bool:
    """Whether the judge finds fault with the call, or with one on other data behind it."""
    forget(fault)
    trial = Trial(load("quantized_experts", fault.spec), "cpu")
    for seed in (0, 1) if fault.stateful else (0,):
        call = trial.build(case.but(seed=seed))
        if trial.judge(call, trial.invoke(call)).findings:
            return True
    return False


def hidden() -> Iterator[Any]:
    for fault in FAULTS:
        for entry, case in fault.hiding():
            yield pytest.param(fault, case, id=f"{fault.name}[{entry}]")


def test_there_are_enough_and_many_are_published() -> None:
    assert len(FAULTS) >= 60
    assert sum(fault.source is not None for fault in FAULTS) >= 18


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_shows_in_its_example(fault: Fault) -> None:
    assert killed(fault, fault.example())


@pytest.mark.parametrize(("fault", "case"), list(hidden()))
def test_fault_is_hidden_where_it_says_so(fault: Fault, case: QuantizedCase) -> None:
    assert not killed(fault, case)


def test_options_left_at_their_defaults_break_no_fault() -> None:
    """Five read a bias that was not given and died of it: no evidence of what the judge sees, and named by no cause."""
    call = Trial(load("quantized_experts", "torch:dequantized"), "cpu").build(QuantizedCase(variant="defaults", T=1))
    left_out = {name: value for name, value in call.keywords.items() if name == "format"}
    for fault in FAULTS:
        with suppress(*REJECTIONS):
            fault.function(*call.args.values(), **left_out)
