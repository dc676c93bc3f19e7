"""Wrong implementations are never passed: strangers' files, and every fault of one device that shows on a CPU.

The faults of many ranks are judged in suites/dispatcher and suites/parallel_linear, those of a part inside a block in
test_block_parts.
"""

import pytest

from moe_harness.harness.core.catalogue import all_faults
from moe_harness.harness.core.contracts import SIGNATURES
from moe_harness.suites.meta.judging import first_kill, functions_of

WRONG = list(functions_of("wrong"))
FAULTS = [f for f in all_faults() if f.stage in SIGNATURES and "cpu" in f.devices and f.part is None]


def test_there_are_enough():
    assert len(WRONG) >= 12
    assert len(FAULTS) >= 200


@pytest.mark.parametrize(("stage", "spec"), WRONG, ids=[spec.rpartition("/")[2] for _, spec in WRONG])
def test_a_strangers_mistake_is_found(stage, spec):
    assert first_kill(stage, spec) is not None


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.stage}-{f.name}" for f in FAULTS])
def test_a_fault_is_found(fault):
    assert first_kill(fault.stage, fault.spec, timeout=6.0) is not None, f"{fault.name} survives; {fault.condition}"
