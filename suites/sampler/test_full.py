"""What the full profile alone plans: more seeds than positions."""

from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.process.worker import judge_id


def test_more_seeds_than_positions_are_judged() -> None:
    """Seed and position can be exchanged on the square alone that both fill."""
    case = "sampler/numeric/data=draws,B=16384,V=19,vary=grid"
    assert judge_id(Trial(load("sampler", "torch"), "cpu"), case).status == "passed"
