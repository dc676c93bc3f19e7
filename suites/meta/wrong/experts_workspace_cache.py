"""A MoE with a workspace that is kept between calls, to save allocations.

Mistake: the workspace is found by its number of rows alone and is not cleared, and the output is a view into it.
"""

import torch
import torch.nn.functional as F

_workspaces = {}


def experts(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])
    key = (x.shape, x.dtype, x.device)
    if key not in _workspaces:
        _workspaces[key] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = _workspaces[key]
    acc = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    touched = (ids >= 0).any(1)
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        g, u = (x[t].float() @ w13[e].float().T).chunk(2, dim=-1)
        acc.index_add_(0, t, ((act(g) * u) @ w2[e].float().T) * topk_weights[t, j, None].float())
    out[touched] = acc[touched].to(x.dtype)
    return out
