"""The stage `dispatcher` as the harness runs it."""

from moe_harness.harness.core.ranked_stage import RankedStage

RANKED = RankedStage(
    made_from=("group",),
    named=("num_experts", "owner"),
    checks=("dense", "live"),
    further=("contract", "inputs", "volume", "refusal", "ranks"),
    has_traits=True,
)
