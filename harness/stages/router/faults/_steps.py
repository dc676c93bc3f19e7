"""A right implementation of the stage `router` whose every step can be replaced; holds no fault itself."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.emulation import wide


def score(logits: Tensor, scoring: str) -> Tensor:
    """Scores over all experts, in fp32 or wider."""
    logits = logits.to(wide(logits))
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r}")
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def add_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    """What the selection looks at."""
    return scores if bias is None else scores + bias.to(scores.dtype)


def best(grouped: Tensor) -> Tensor:
    """Score of a group: its largest."""
    return grouped.amax(-1)


def best_two(grouped: Tensor) -> Tensor:
    """Score of a group: the sum of its two largest."""
    return grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)


def keep_groups(
    selection: Tensor, groups: int, kept: int, group_score: Callable[[Tensor], Tensor], fill: float = -torch.inf
) -> Tensor:
    """Fill the experts of all but the `kept` best groups, so that they are not chosen."""
    grouped = selection.unflatten(-1, (groups, -1))
    chosen = group_score(grouped).topk(kept, -1).indices
    allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=selection.device).scatter(-1, chosen, True)
    return torch.where(allowed[..., None], grouped, fill).flatten(-2)


def choose(selection: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest."""
    return selection.topk(top_k, -1).indices


def weigh(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
    """Weights of the chosen experts."""
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale


class Steps(NamedTuple):
    """The steps that round: an implementation with other roundings has others."""

    score: Callable[[Tensor, str], Tensor] = score
    weigh: Callable[[Tensor, Tensor, bool, float], Tensor] = weigh


RIGHT = Steps()


def run(
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
    steps: Steps = RIGHT,
    score: Callable[[Tensor, str], Tensor] | None = None,
    add_bias: Callable[[Tensor, Tensor | None], Tensor] = add_bias,
    without_bias: Callable[[Tensor], Tensor] = best,
    with_bias: Callable[[Tensor], Tensor] = best_two,
    keep_groups: Callable[..., Tensor] = keep_groups,
    choose: Callable[[Tensor, int], Tensor] = choose,
    weigh: Callable[[Tensor, Tensor, bool, float], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A right implementation; every keyword after `steps` replaces one of its steps."""
    scores = (score or steps.score)(router_logits, scoring)
    selection = add_bias(scores, correction_bias)
    if num_expert_group is not None and topk_group is not None:
        group_score = without_bias if correction_bias is None else with_bias
        selection = keep_groups(selection, num_expert_group, topk_group, group_score)
    ids = choose(selection, top_k)
    return (weigh or steps.weigh)(scores, ids, renormalize, routed_scaling_factor), ids


Routed = tuple[Tensor, Tensor]
