"""What a decoding step over ranks joins in one launch, its kernels interpreted: logits within the bound of rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.ranks import pool
from moe_harness.harness.stages.model.noise import logit_bound
from moe_harness.reference.model import Model as Reference
from moe_harness.suites.model.ranked_tasks import Cell
from moe_harness.suites.model.test_coverage import ep

TASK = "moe_harness.suites.model.graphed_tasks:joined_step"


@pytest.mark.parametrize("layout", [{}, ep("local_allreduce")], ids=["columns", "whole experts"])
@torch.no_grad()
def test_a_step_over_ranks_sums_slots_and_pieces_behind_them(layout: dict[str, Any], tmp_path: Path) -> None:
    changes = {"head_dim": 64}  # the projection behind attention is deep enough for two pieces
    cell = Cell("qwen3_moe", 2, layout, changes, dtype="fp32")
    folder = checkpoints.make(tmp_path, cell.family, dtype=torch.float32, **changes)
    outcome = pool.run(TASK, cell.spec(folder), ranks=2, budget=240)
    assert outcome.ok, outcome.failure
    first, second = outcome.results
    assert first == second, "ranks have different logits"
    keys = checkpoints.config(cell.family, **changes)
    layers = keys["num_hidden_layers"]
    assert first["asked"].count("slots") == layers and first["asked"].count("pieces") == layers
    reference = Reference(keys, checkpoints.tensors(keys, dtype=torch.float32))
    bound = logit_bound(reference, torch.tensor([first["ids"]]), torch.float32)
    logits = torch.tensor(first["logits"])[None, None].expand_as(bound.value)
    assert bool(bound.decided()[0, 2]) and first["ids"][3] == int(bound.value[0, 2].argmax()), "another token is chosen"
    assert bool(bound.routed[0, -1])
    assert bound.z(logits)[0, -1].abs().max() <= bounds.max_limit()
