"""What the bench times of the stage `router`."""

import torch

from moe_harness.harness.bench.data import SETS, Draw, TimedBatch, TimedLayer, Weights, sample


def batch(layer: TimedLayer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> TimedBatch:
    """The model's own rule; weights of four bytes and ids of eight are written."""
    model = layer.model
    keywords = {
        "top_k": model.top_k, "scoring": model.scoring, "renormalize": model.renormalize,
        "correction_bias": draw.uniform(model.num_experts) if model.correction_bias else None,
        "num_expert_group": model.num_expert_group, "topk_group": model.topk_group,
        "routed_scaling_factor": model.routed_scaling_factor,
    }  # fmt: skip
    logits = [draw.normal(tokens, model.num_experts, dtype=dtype) for _ in range(SETS)]
    size = logits[0].numel() * logits[0].element_size() + tokens * model.top_k * 12.0
    return TimedBatch("router", [({"router_logits": x}, keywords) for x in logits], size, 0.0, sample(tokens, draw))
