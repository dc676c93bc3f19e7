"""A router with its own softmax.

Mistake: exp without subtracting the maximum, so large logits overflow; a guard hides the NaN as zeros.
"""

import torch


def router(
    logits, *, top_k, scoring="softmax", renormalize=True, correction_bias=None, num_expert_group=None,
    topk_group=None, routed_scaling_factor=1.0,
):  # fmt: skip
    x = logits.float()
    if scoring == "softmax":
        p = x.exp()
        scores = torch.nan_to_num(p / p.sum(-1, keepdim=True))
    else:
        scores = x.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if num_expert_group and topk_group:
        grouped = choice.unflatten(-1, (num_expert_group, -1))
        rank = grouped.amax(-1) if correction_bias is None else grouped.topk(2, -1).values.sum(-1)
        mask = torch.zeros_like(rank).scatter(1, rank.topk(topk_group, -1).indices, 1.0)
        choice = torch.where(mask[..., None] > 0, grouped, -torch.inf).flatten(-2)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids
