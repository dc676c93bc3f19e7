"""torchtitan's `TokenChoiceTopKRouter`.  Read and tried, on the CPU, in 0.3.0.

The module multiplies by its gate first, in fp32; here the gate passes on the logits in fp32.
"""

import warnings
from types import SimpleNamespace

import torch
from torch import Tensor

from moe_harness.impls.foreign import needed, refuse

__all__ = ["router"]

INSTALL = "pip install torchtitan==0.3.0"


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
    """router_logits [T, E] -> weights [T, k] fp32, ids [T, k] int64.

    A group counts there by the sum of its two best experts, bias or not: groups without a bias are refused, and so are
    groups of one expert.
    """
    experts = router_logits.shape[1]
    refuse(
        "torchtitan's router", groups_without_a_bias=num_expert_group is not None and correction_bias is None,
        group_of_one_expert=num_expert_group is not None and experts < 2 * num_expert_group,
    )  # fmt: skip
    kind = needed("torchtitan.models.common.moe", "TokenChoiceTopKRouter", INSTALL)
    module = kind(
        kind.Config(
            num_experts=experts, gate=SimpleNamespace(build=torch.nn.Identity), num_expert_groups=num_expert_group,
            num_limited_groups=topk_group, top_k=top_k, score_func=scoring, route_norm=renormalize,
            route_scale=routed_scaling_factor,
        )
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the CPU its autocast to fp32 warns that there is none
        weights, ids, _ = module(router_logits.float(), correction_bias)
    return weights, ids
