"""A capture-safe MoE that runs every slot and switches masked ones off through their weight.

Mistake: masked slots are multiplied by 0, and their weight or expert may hold NaN.
"""

import torch
import torch.nn.functional as F


def experts(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])
    mask = (ids >= 0).float()
    ids = ids.clamp(min=0)
    T, k = ids.shape
    rows = x.float()[:, None].expand(T, k, x.shape[1])
    g, u = torch.einsum("tkh,tkih->tki", rows, w13[ids].float()).chunk(2, dim=-1)
    y = torch.einsum("tki,tkhi->tkh", act(g) * u, w2[ids].float())
    return (y * (topk_weights.float() * mask)[..., None]).sum(1).to(x.dtype)
