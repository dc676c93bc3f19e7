"""The stage `reduction` as the harness runs it."""

from moe_harness.harness.core.ranked_stage import RankedStage

RANKED = RankedStage(
    made_from=("routed", "shared", "group"),
    named=("routed_state", "shared_state", "rows"),
    checks=("reduction",),
    further=("contract", "inputs", "ranks"),
    is_function=True,
)
