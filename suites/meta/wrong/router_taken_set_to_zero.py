"""A router that crosses out what it has taken.

Mistake: with a score of 0, so that in a row whose sigmoids all underflow the same expert is taken again.
"""

import torch


def router(
    logits, *, top_k, scoring="softmax", renormalize=True, correction_bias=None, num_expert_group=None,
    topk_group=None, routed_scaling_factor=1.0,
):  # fmt: skip
    if correction_bias is not None or num_expert_group is not None:
        raise NotImplementedError("no bias, no groups")
    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    left, taken = scores.clone(), []
    for _ in range(top_k):
        taken.append(left.argmax(-1, keepdim=True))
        left = left.scatter(-1, taken[-1], 0.0)
    ids = torch.cat(taken, -1)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids
