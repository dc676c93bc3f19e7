"""The stage `gather` as the harness runs it."""

from moe_harness.harness.core.ranked_stage import RankedStage

RANKED = RankedStage(
    made_from=("rows", "group"), named=(), checks=("rows",), further=("contract", "ranks"), is_function=True
)
