"""The stage `parallel_linear` as the harness runs it."""

from moe_harness.harness.core.ranked_stage import RankedStage

RANKED = RankedStage(
    made_from=("num_experts", "in_features", "out_features"),
    named=("rank", "world_size", "dtype", "device"),
    checks=("shard",),
    further=("contract", "inputs", "ranks"),
    has_traits=True,
)
