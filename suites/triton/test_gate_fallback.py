"""Which rows the Triton gate leaves to the plain expression, and that both ways give the same result."""

import pytest
import torch

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.shared_expert_gate.bound import gate_bound
from moe_harness.impls.triton import shared_expert_gate as gate
from moe_harness.suites.triton import DEVICE, runnable

pytestmark = runnable


@pytest.mark.parametrize(
    ("hidden", "width", "kernel"),
    [(1, 1, True), (gate.LONGEST, 8, True), (gate.LONGEST + 1, 8, False), (8, gate.LONGEST + 1, False), (0, 8, False)],
)
def test_rows_longer_than_a_program_holds_fall_back(hidden: int, width: int, kernel: bool) -> None:
    assert gate.fits(hidden, width) is kernel


@pytest.mark.parametrize("fallback", [False, True])
def test_both_ways_are_right(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, two leading dimensions, D other than H."""
    if fallback:
        monkeypatch.setattr(gate, "LONGEST", 4)
    args = [torch.randn(size, device=DEVICE).bfloat16() for size in ((2, 3, 40), (1, 40), (2, 3, 24))]
    result = gate.shared_expert_gate(*args)
    bound = gate_bound(*args, declared=gate.shared_expert_gate.rounds)
    assert float(bound.z(result).abs().amax()) <= bounds.max_limit()
