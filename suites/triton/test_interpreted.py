"""The judge on the Triton kernels without a GPU: a few small cases of every check, under Triton's interpreter.

The whole quick profile takes minutes there: TRITON_INTERPRET=1 moe-harness check --stage experts --impl triton.
"""

from itertools import groupby

import pytest

from moe_harness.harness.core.plan import ON_CUDA_ONLY, Planned, Request, plan
from moe_harness.harness.process.pool import Pool
from moe_harness.suites.triton import CUDA, runnable

pytestmark = [*runnable, pytest.mark.skipif(CUDA, reason="judged on the GPU itself: moe-harness check --device cuda")]

PER_CHECK = {
    "router": 3, "experts": 1, "grouped_linear": 2, "shared_expert_gate": 4,
    "rms_norm": 3, "rope_cache": 1, "paged_attention": 1, "sampler": 1,
}  # fmt: skip
SMALL = {"experts": 24, "rope_cache": 24, "sampler": 18}  # steps: these take a second or more where others take 0.1
TOO_SLOW = ("leak", "determinism", "batch_invariance")  # many calls each


def sample(stage: str) -> list[Planned]:
    """Cases of each check spread evenly over its small ones."""
    chosen = []
    for check, planned in groupby(plan(stage, Request()), key=lambda p: p.check):
        small = [p for p in planned if p.case.steps() <= SMALL.get(stage, 40)]
        if small and check not in (*ON_CUDA_ONLY, *TOO_SLOW):
            step = max(1, len(small) // PER_CHECK[stage])
            chosen += small[step // 2 :: step][: PER_CHECK[stage]]  # from the middle: a plan begins in fp32
    return chosen


@pytest.mark.parametrize("stage", PER_CHECK)
def test_small_cases_pass(stage: str) -> None:
    planned = sample(stage)
    assert len({p.check for p in planned}) >= 6
    with Pool(stage, "triton", "cpu", 1, 60.0) as pool:
        assert pool.start().interpreted
        answers = list(pool.judge([p.id for p in planned]))
    wrong = [(a.id, a.reason or a.findings[0].message) for a in answers if a.status != "passed"]
    assert not wrong
