"""Routed experts that lose whatever lies beyond the 64th: their ids are kept in six bits."""

import torch
from swapped import fused as swapped


def fused(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, **options):
    gate, up = gate_up_proj.chunk(2, 1)
    ids = torch.where(topk_ids < 0, topk_ids, topk_ids % 64)
    return swapped(hidden_states, torch.cat([up, gate], 1), down_proj, topk_weights, ids, **options)
