"""What the bench times of the stage `experts`."""

import torch

from moe_harness.harness.bench.data import Draw, TimedBatch, TimedLayer, Weights, sample

NEEDS_WEIGHTS = True  # of the experts


def batch(layer: TimedLayer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> TimedBatch:
    """Uniform routing; on one rank of many, ids are global and a map gives the local ones."""
    model, local = layer.model, layer.local
    x = draw.normal(tokens, model.hidden_size, dtype=dtype)
    top = draw.uniform(tokens, model.num_experts).topk(model.top_k, dim=-1)
    expert_map = None
    if layer.ep_size > 1:
        expert_map = torch.full((model.num_experts,), -1, device=draw.device)
        expert_map[:local] = torch.arange(local, device=draw.device)
    here = top.indices[top.indices < local]
    routing = {"topk_weights": top.values.softmax(-1).to(dtype), "topk_ids": top.indices}
    calls = [
        ({"hidden_states": x, "gate_up_proj": up, "down_proj": down} | routing,
         {"activation": "silu", "expert_map": expert_map})
        for up, down in weights
    ]  # fmt: skip
    one = 3 * model.hidden_size * model.intermediate_size
    size = (len(here.unique()) * one + 2 * x.numel()) * x.element_size()
    return TimedBatch("experts", calls, size, 2.0 * here.numel() * one, sample(tokens, draw))
