"""Every published fault of ranks is seen by the checks of the coverage list, which the right engine passes there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.ranks import pool
from moe_harness.suites.model.planted_ranks import FAULTS
from moe_harness.suites.model.ranked_tasks import Cell
from moe_harness.suites.model.test_coverage import TASKS, check_cell

RANKS = 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    options: dict[str, Any] = dict(fault.layout)
    cell = Cell(fault.family, RANKS, options, dict(fault.changes))
    folder = checkpoints.make(tmp_path, fault.family, dtype=torch.float32, **fault.changes)
    wrong = pool.run(f"{TASKS}:faulty", cell.spec(folder) | {"fault": name}, ranks=RANKS)
    if wrong.failure is not None:
        assert re.search(fault.seen, wrong.failure.cause), wrong.failure
        return
    with pytest.raises(AssertionError, match=fault.seen):
        check_cell(wrong.results, cell)
