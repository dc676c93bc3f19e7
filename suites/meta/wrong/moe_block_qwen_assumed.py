"""A block written after Qwen3-MoE and used for all models.

Mistake: weights are always renormalised, and the shared expert is added without its gate.
"""

import torch
import torch.nn.functional as F


def moe_block(hidden_states, weights, config):
    if config["model_type"].startswith("deepseek"):
        raise NotImplementedError("DeepSeek")
    x = hidden_states.float()
    logits = (x @ weights["gate.weight"].float().T).to(hidden_states.dtype)
    topk_weights, ids = logits.float().softmax(-1).topk(config["num_experts_per_tok"], -1)
    topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        t, j = torch.where(ids == e)
        g, u = (x[t] @ weights["experts.gate_up_proj"][e].float().T).chunk(2, -1)
        y = (F.silu(g) * u) @ weights["experts.down_proj"][e].float().T
        out.index_add_(0, t, y * topk_weights[t, j, None])
    if "shared_expert.up_proj.weight" in weights:
        gate, up, down = (weights[f"shared_expert.{n}_proj.weight"].float() for n in ("gate", "up", "down"))
        out = out + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return out.to(hidden_states.dtype)
