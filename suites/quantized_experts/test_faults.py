"""Every fault of the stage shows in its own example, to the judge itself, and is hidden where it says so."""

from collections.abc import Iterator
from typing import Any

import pytest

from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.diagnosis.candidates import forget
from moe_harness.harness.stages.quantized_experts.cases import QuantizedCase

FAULTS = all_faults("quantized_experts")
TYPES: dict[str, Any] = {"int": int, "bool": lambda text: bool(int(text)), "str": str}


def changes(text: str) -> dict[str, Any]:
    """The fields of "name=value,name=value"."""
    fields = QuantizedCase.__dataclass_fields__
    pairs = [item.partition("=") for item in text.split(",")]
    return {name: TYPES[getattr(fields[name].type, "__name__", fields[name].type)](value) for name, _, value in pairs}


def killed(fault: Fault, case: QuantizedCase) -> bool:
    """Whether the judge finds fault with the call, or with one on other data behind it."""
    forget(fault)
    trial = Trial(load("quantized_experts", fault.spec), "cpu")
    for seed in (0, 1) if fault.stateful else (0,):
        call = trial.build(case.but(seed=seed))
        if trial.judge(call, trial.invoke(call)).findings:
            return True
    return False


def example(fault: Fault) -> QuantizedCase:
    return QuantizedCase(dtype="bf16").but(**dict(fault.shows or {}))


def hidden() -> Iterator[Any]:
    for fault in FAULTS:
        for text in fault.hidden:
            yield pytest.param(fault, changes(text), id=f"{fault.name}[{text}]")


def test_there_are_enough_and_many_are_published() -> None:
    assert len(FAULTS) >= 60
    assert sum(fault.source is not None for fault in FAULTS) >= 18


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_shows_in_its_example(fault: Fault) -> None:
    assert killed(fault, example(fault))


@pytest.mark.parametrize(("fault", "fields"), list(hidden()))
def test_fault_is_hidden_where_it_says_so(fault: Fault, fields: dict[str, Any]) -> None:
    assert not killed(fault, example(fault).but(**fields))
