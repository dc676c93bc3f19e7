"""torchtitan's `TokenChoiceTopKRouter`.  Untried: written against its interface.

The module multiplies by its gate first; here the gate passes the logits on.
"""

import torch
from torch import Tensor

from moe_harness.impls.foreign import needed, refuse

__all__ = ["router"]


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
    """router_logits [T, E] -> weights [T, k], ids [T, k] int64; without groups."""
    refuse("torchtitan's router", groups=num_expert_group)
    build = needed("torchtitan.models.moe.moe", "TokenChoiceTopKRouter", "pip install torchtitan")
    experts = router_logits.shape[1]
    module = build(
        dim=experts, num_experts=experts, top_k=top_k, score_func=scoring, route_norm=renormalize,
        route_scale=routed_scaling_factor,
    )  # fmt: skip
    module.gate = torch.nn.Identity()
    weights, ids, _ = module(router_logits, correction_bias)
    return weights, ids
