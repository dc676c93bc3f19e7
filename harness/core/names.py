"""Names of the checks, for callers that must not import torch."""

CHECK_NAMES = (
    "contract", "exact", "numeric", "routing", "sentinels", "layouts", "memory", "special", "laws", "determinism",
    "batch_invariance", "leak", "property", "graph_replay", "side_stream", "large_offsets",
)  # fmt: skip

# Causes of outputs that say nothing of the way they were computed; where one holds, no other is named.
PLAIN = ("all_nan", "all_zeros", "constant_output", "input_copied")
