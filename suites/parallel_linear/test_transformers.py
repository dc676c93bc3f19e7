"""transformers' expert parallelism, which ours is timed against, computes the block that it says."""

import pytest

pytest.importorskip("transformers", minversion="5.17")

from moe_harness.harness.core.bounds import max_limit
from moe_harness.harness.ranks import pool


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_the_block_on_one_rank(ranks: int, implementation: str) -> None:
    outcome = pool.run(
        "moe_harness.suites.parallel_linear.transformers_task:run", {"experts": implementation}, ranks=ranks
    )
    assert outcome.ok, (outcome.failure.headline(), outcome.failure.trace)
    assert max(outcome.results) <= max_limit(), outcome.results
