"""What the bench times of the stage `shared_expert_gate`."""

from typing import Any

import torch

from moe_harness.harness.bench.data import SETS, Draw, TimedBatch, TimedLayer, Weights, sample


def batch(layer: TimedLayer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> TimedBatch:
    hidden = layer.model.hidden_size

    def call() -> tuple[dict[str, Any], dict[str, Any]]:
        x, shared = (draw.normal(tokens, hidden, dtype=dtype) for _ in range(2))
        gate = draw.normal(1, hidden, dtype=dtype, scale=hidden**-0.5)
        return {"hidden_states": x, "gate_weight": gate, "shared_output": shared}, {}

    calls = [call() for _ in range(2 * SETS)]  # four, or 8192 rows of 1024 would stay in the cache
    size = (3.0 * tokens + 1) * hidden * calls[0][0]["hidden_states"].element_size()
    return TimedBatch("shared_expert_gate", calls, size, 0.0, sample(tokens, draw))
