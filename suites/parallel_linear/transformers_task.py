"""What one rank does in the test of transformers' expert parallelism."""

from typing import Any

import torch

from moe_harness.harness.core.ranked_subject import load
from moe_harness.harness.core.ranked_task import Rank
from moe_harness.harness.stages.moe_block.bound import block_bound


def run(me: Rank, spec: dict[str, Any], seed: int) -> float:
    """Task: the largest error of this rank's output in sigmas of the block's bound."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"gate.weight": (8, 16), "experts.gate_up_proj": (8, 24, 16), "experts.down_proj": (8, 16, 12)}
    weights = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    x = torch.randn(7, 16, generator=random)
    kind = load("moe_block", "moe_harness.impls.transformers.expert_parallel:ExpertParallel")
    block = kind(me.group, weights, top_k=3, experts_implementation=spec["experts"])
    config = {"model_type": "qwen3_moe", "num_experts_per_tok": 3, "norm_topk_prob": True}
    bound = block_bound(x, weights, config, declared=None)
    return float(bound.z(block(x)).abs().nan_to_num(float("inf")).max())
