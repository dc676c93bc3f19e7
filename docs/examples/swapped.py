"""Routed experts with a published bug: gate and up are read in the other order."""

import torch
from torch.nn.functional import gelu, silu


def fused(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in ids[ids >= 0].unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        u, g = (hidden_states[token].float() @ gate_up_proj[expert].float().T).chunk(2, -1)  # [gate; up] is right
        hidden = (silu(g) if activation == "silu" else gelu(g, approximate="tanh")) * u
        rows = topk_weights[token, slot, None].float() * (hidden @ down_proj[expert].float().T)
        out.index_add_(0, token, rows)
    return out.to(hidden_states.dtype)
