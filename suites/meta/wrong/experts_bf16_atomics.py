"""A split-K MoE for fp32, fp16 and bf16 whose partial results meet in a bf16 accumulator.

Mistake: a bf16 accumulator inside the second product, for every dtype.
"""

import torch
import torch.nn.functional as F


def experts(x, w13, w2, topk_weights, topk_ids, *, activation="silu", expert_map=None):
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids[ids >= 0].unique().tolist():
        t, j = torch.where(ids == e)
        g, u = (x[t].float() @ w13[e].float().T).chunk(2, dim=-1)
        a, y = act(g) * u, torch.zeros(len(t), w2.shape[1], dtype=torch.bfloat16, device=x.device)
        for s in range(0, a.shape[1], 8):
            y += (a[:, s : s + 8] @ w2[e][:, s : s + 8].float().T).to(torch.bfloat16)
        out.index_add_(0, t, y.float() * topk_weights[t, j, None].float())
    return out.to(x.dtype)
