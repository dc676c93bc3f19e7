r"""Top-k routing: from the logits of a token over all experts to k weights and k expert ids.

    scores  = softmax(logits)  or  sigmoid(logits)            [T, E], at least fp32
    chosen  = the top_k experts by  scores + correction_bias  [T, k], inside the best groups
    weights = scores[chosen]  (/ their sum)  * routed_scaling_factor

The correction bias (DeepSeek-V3) decides who is chosen and never enters the weights.  With groups, E is split into
`num_expert_group` equal runs; only experts of the `topk_group` runs with the highest group score can be chosen.
"""

import torch
from torch import Tensor


def expert_scores(router_logits: Tensor, scoring: str) -> Tensor:
    """Scores of every expert, [T, E], in fp32 or in the wider dtype of the logits."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    raise ValueError(f"scoring is {scoring!r}, but should be 'softmax' or 'sigmoid'")


def group_scores(selection: Tensor, num_expert_group: int, *, biased: bool) -> Tensor:
    """Score of each group of experts, [T, E] -> [T, num_expert_group].

    DeepSeek-V3 adds the two best biased scores of a group; DeepSeek-V2, without a bias, takes the best one.
    """
    grouped = selection.unflatten(-1, (num_expert_group, -1))
    return grouped.topk(2, dim=-1).values.sum(-1) if biased else grouped.amax(-1)


def selection_scores(scores: Tensor, correction_bias: Tensor | None) -> Tensor:
    """What the choice is made on, [T, E]: the scores, plus the correction bias where there is one."""
    return scores if correction_bias is None else scores + correction_bias.to(scores.dtype)


def combine_weights(scores: Tensor, topk_ids: Tensor, *, renormalize: bool, routed_scaling_factor: float) -> Tensor:
    """Weights of the chosen experts, [T, E] and [T, k] -> [T, k]; NaN where their scores are all 0 (0 / 0)."""
    weights = scores.gather(-1, topk_ids.long())
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor


def router(
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token.

    Args:
        router_logits: [T, E], any floating dtype.
        correction_bias: [E], added for the selection only.

    Returns:
        topk_weights [T, k] (fp32 or wider) and topk_ids [T, k] (int64), highest selection score first.

    Raises:
        ValueError: unknown `scoring`.
    """
    scores = expert_scores(router_logits, scoring)
    selection = selection_scores(scores, correction_bias)
    if num_expert_group is not None and topk_group is not None:
        by_group = group_scores(selection, num_expert_group, biased=correction_bias is not None)
        allowed = torch.zeros_like(by_group, dtype=torch.bool).scatter(-1, by_group.topk(topk_group).indices, True)
        group_size = selection.shape[-1] // num_expert_group
        selection = selection.masked_fill(~allowed.repeat_interleave(group_size, dim=-1), -torch.inf)
    topk_ids = selection.topk(top_k, dim=-1).indices
    weights = combine_weights(scores, topk_ids, renormalize=renormalize, routed_scaling_factor=routed_scaling_factor)
    return weights, topk_ids
