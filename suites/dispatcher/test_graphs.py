"""Dispatch, experts and combine captured in one CUDA graph and replayed with other tokens and other routing.

A scheme allows it where nothing is read back to the host: shapes depend on a bound or on a number of tokens that all
ranks know.  The others wait for counts in every call, which a capture refuses.
"""

from typing import Any

import pytest

from moe_harness.harness.ranks import pool
from moe_harness.suites.dispatcher.subjects import GPU_WORLDS

TASK, TOKENS = "moe_harness.suites.dispatcher.graph_tasks:run", 5
CAPTURED: dict[str, dict[str, Any]] = {
    "local_allreduce": {"verify": False},
    "allgather_reducescatter": {"equal_tokens": True},
    "masked": {"max_tokens": TOKENS},
    "symmetric": {"max_tokens": TOKENS},
}


def _wrong(scheme: str, options: dict[str, Any], experts: str, world: int, backend: str) -> list[str]:
    spec = {"impl": f"dispatchers:{scheme}", "options": options, "experts": experts, "tokens": TOKENS}
    outcome = pool.run(TASK, spec, ranks=world, backend=backend)
    assert outcome.ok, (outcome.failure.headline(), outcome.failure.trace)
    return [line for result in outcome.results for line in result]


@pytest.mark.parametrize("scheme", [name for name in CAPTURED if name != "symmetric"])
def test_the_layer_itself_is_right(scheme: str) -> None:
    """On the CPU, called and not replayed."""
    assert not _wrong(scheme, CAPTURED[scheme], "torch:loop", 2, "gloo")


@pytest.mark.parametrize("scheme", CAPTURED)
@pytest.mark.parametrize("world", GPU_WORLDS)
def test_replays_with_other_routing(scheme: str, world: int) -> None:
    assert not _wrong(scheme, CAPTURED[scheme], "triton", world, "nccl")


@pytest.mark.multigpu(n=2)
@pytest.mark.parametrize("scheme", ["all_to_all_dedup", "symmetric"])
def test_what_reads_counts_cannot_be_captured(scheme: str) -> None:
    spec = {"impl": f"dispatchers:{scheme}", "options": {}, "experts": "triton", "tokens": TOKENS}
    outcome = pool.run(TASK, spec, ranks=2, backend="nccl")
    assert outcome.failure is not None
    assert "captur" in outcome.failure.cause, outcome.failure.headline()
