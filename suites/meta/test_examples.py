"""Faults of the attention side do what their entries say: the judge rejects them on the case named, and only there."""

import pytest

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.process.worker import judge_id

STAGES = ("rms_norm", "rope_cache", "paged_attention", "sampler")
# Those of CUDA alone are tried without a GPU in test_checks_cuda.py, with one in test_catalogue_cuda.py.
FAULTS = [
    pytest.param(fault, id=fault.name) for stage in STAGES for fault in all_faults(stage) if "cpu" in fault.devices
]


def status(fault: Fault, case: Case) -> str:
    check = "laws" if case.variant else "exact" if case.data in ("exact", "greedy") else "numeric"
    return judge_id(Trial(load(fault.stage, fault.spec), "cpu"), f"{fault.stage}/{check}/{case.id()}").status


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows_where_it_says(fault: Fault) -> None:
    assert status(fault, fault.example()) == "failed"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_hides_where_it_says(fault: Fault) -> None:
    for entry, case in fault.hiding():
        assert status(fault, case) == "passed", entry
