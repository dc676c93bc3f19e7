"""What the bench times of the stage `grouped_linear`."""

import torch

from moe_harness.harness.bench.data import Draw, TimedBatch, TimedLayer, Weights, sample

NEEDS_WEIGHTS = True  # of the experts


def batch(layer: TimedLayer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> TimedBatch:
    """The experts' first product on its own: tokens * top_k sorted rows, [E, 2I, H]."""
    model, local = layer.model, layer.local
    ids = (draw.uniform(tokens * model.top_k) * local).long().clamp(max=local - 1)
    sizes = torch.bincount(ids, minlength=local)
    x = draw.normal(len(ids), model.hidden_size, dtype=dtype)
    calls = [({"x": x, "weight": up, "group_sizes": sizes}, {"bias": None}) for up, _ in weights]
    one = 2 * model.hidden_size * model.intermediate_size
    rows = len(ids) * (model.hidden_size + 2 * model.intermediate_size)
    size = (int((sizes > 0).sum()) * one + rows) * x.element_size()
    return TimedBatch("grouped_linear", calls, size, 2.0 * len(ids) * one, sample(len(ids), draw))
