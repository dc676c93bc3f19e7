"""Top-k routing in plain PyTorch: router_logits [T, E] -> topk_weights [T, k] fp32, topk_ids [T, k] int64.

`loop` takes the best expert, crosses it out and takes the next.  `topk` is the line that model code has: softmax, topk,
renormalise.
"""

import torch
from torch import Tensor

__all__ = ["loop", "topk"]


def loop(
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
    """The stage `router` of the contract.

    Raises:
        ValueError: unknown scoring, groups that do not divide E, or fewer selectable experts than top_k.
    """
    num_experts = router_logits.shape[1]
    _check(num_experts, top_k, scoring, num_expert_group, topk_group)
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
    if num_expert_group is not None and topk_group is not None:
        choice = _keep_best_groups(choice, num_expert_group, topk_group, biased=correction_bias is not None)
    ids = _best(choice, top_k)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    return weights * routed_scaling_factor, ids


loop.rounds = ()
loop.deterministic = True
loop.graph_capturable = True


def topk(
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
    """The stage `router` for softmax without groups, bias and scale.

    Raises:
        NotImplementedError: any of those.
    """
    if scoring != "softmax" or correction_bias is not None or num_expert_group is not None:
        raise NotImplementedError("the plain expression has softmax only, no correction bias and no groups")
    if routed_scaling_factor != 1.0:
        raise NotImplementedError("the plain expression does not scale")
    weights, ids = router_logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


topk.rounds = ()
topk.graph_capturable = True


def _check(num_experts: int, top_k: int, scoring: str, num_expert_group: int | None, topk_group: int | None) -> None:
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r}, but should be 'softmax' or 'sigmoid'")
    selectable = num_experts
    if num_expert_group is not None and topk_group is not None:
        if num_experts % num_expert_group:
            raise ValueError(f"{num_experts} experts do not split into {num_expert_group} equal groups")
        selectable = topk_group * (num_experts // num_expert_group)
    if top_k > selectable:
        raise ValueError(f"top_k is {top_k}, but only {selectable} experts can be chosen")


def _best(values: Tensor, count: int) -> Tensor:
    """Column indices of the `count` largest values of each row, [T, n] -> [T, count], distinct in every row.

    A column already taken gets -inf.  To stay distinct the others must lie above it, so they are lifted to the
    smallest finite number; a NaN stays NaN, and argmax takes NaNs first, one column after the other.
    """
    left = values.clamp(min=torch.finfo(values.dtype).min)
    chosen = []
    for _ in range(count):
        best = left.argmax(1, keepdim=True)
        left = left.scatter(1, best, -torch.inf)
        chosen.append(best)
    return torch.cat(chosen, dim=1) if chosen else values.new_zeros(len(values), 0, dtype=torch.int64)


def _keep_best_groups(choice: Tensor, num_expert_group: int, topk_group: int, *, biased: bool) -> Tensor:
    """`choice` [T, E] with -inf outside the best groups; with a bias a group counts by its two best experts."""
    tokens, num_experts = choice.shape
    grouped = choice.reshape(tokens, num_expert_group, num_experts // num_expert_group)
    members = min(2, grouped.shape[2]) if biased else 1
    flat = grouped.reshape(-1, grouped.shape[2])
    group_score = flat.gather(1, _best(flat, members)).sum(1).reshape(tokens, num_expert_group)
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, _best(group_score, topk_group), True)
    return grouped.masked_fill(~kept.unsqueeze(2), -torch.inf).reshape(tokens, num_experts)
