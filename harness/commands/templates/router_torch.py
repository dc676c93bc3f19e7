"""The stage `router`: from each token's logits to k experts and their weights.

    scores  = softmax(logits) over all E, or sigmoid(logits), in fp32
    chosen  = the top_k by scores + correction_bias, inside the best groups
    weights = scores[chosen]  / their sum (renormalize)  * routed_scaling_factor

- The bias decides who is chosen and never enters the weights.
- Groups: E is split into num_expert_group equal runs.  A run's score is its largest score or, with a correction bias,
  the sum of its two largest biased scores; only experts of the best topk_group runs can be chosen.
- ids are distinct, int32 or int64, in any order, paired with the weights.  Among equal scores any choice is right.
- A row that holds NaN: ids distinct and in range all the same; other rows unaffected.  T = 0 gives empty tensors.

    moe-harness check --stage router --impl FILE:router
"""

import torch
from torch import Tensor


def router(
    router_logits: Tensor,  # [T, E]
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,  # [E]
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # weights [T, k], ids [T, k]
    logits = router_logits.float()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if num_expert_group is not None and topk_group is not None:
        grouped = choice.unflatten(-1, (num_expert_group, -1))
        best = grouped.amax(-1) if correction_bias is None else grouped.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(topk_group, -1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    ids = choice.topk(top_k, -1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids


# What it promises; optional, and what is promised is judged.
router.deterministic = True
