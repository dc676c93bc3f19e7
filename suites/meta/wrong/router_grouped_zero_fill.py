"""A grouped router for DeepSeek-V3.

Mistake: experts of the other groups are multiplied by 0, which beats a score pushed below 0 by its bias.
"""

import torch


def router(
    logits, *, top_k, scoring="softmax", renormalize=True, correction_bias=None, num_expert_group=None,
    topk_group=None, routed_scaling_factor=1.0,
):  # fmt: skip
    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if num_expert_group and topk_group:
        grouped = choice.unflatten(-1, (num_expert_group, -1))
        rank = grouped.amax(-1) if correction_bias is None else grouped.topk(2, -1).values.sum(-1)
        mask = torch.zeros_like(rank).scatter(1, rank.topk(topk_group, -1).indices, 1.0)
        choice = (grouped * mask[..., None]).flatten(-2)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids
