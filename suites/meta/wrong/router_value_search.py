"""A router that finds the largest values first and looks up where they are.

Mistake: equal logits, ordinary in bf16, give the same expert several times.
"""

import torch


def router(
    logits, *, top_k, scoring="softmax", renormalize=True, correction_bias=None, num_expert_group=None,
    topk_group=None, routed_scaling_factor=1.0,
):  # fmt: skip
    if num_expert_group or correction_bias is not None:
        raise NotImplementedError("neither groups nor bias")
    scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
    weights = scores.sort(-1, descending=True).values[:, :top_k]
    ids = (scores[:, None, :] == weights[:, :, None]).to(torch.uint8).argmax(-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids
