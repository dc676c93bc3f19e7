"""Megatron Core's `topk_routing_with_score_function`.  Read and tried, on the CPU, in 0.16.1 (docs/released.md).

It gives probabilities and a map over all experts, [T, E] both; here the chosen ones are read from them.
"""

from torch import Tensor

from moe_harness.impls.foreign import needed, refuse

__all__ = ["router"]

INSTALL = "pip install megatron-core==0.16.1"


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
    """router_logits [T, E] -> weights [T, k], ids [T, k] int64.

    A group counts there by the sum of its top_k / topk_group best experts: where that is not the contract's number
    (one, with a bias two), groups are refused.  Sigmoid is always renormalised, but for one expert a token never; a
    bias goes with sigmoid only.
    """
    counted = top_k // topk_group if topk_group else 0
    wanted = 1 if correction_bias is None else 2
    refuse(
        "megatron's router", softmax_with_a_bias=scoring == "softmax" and correction_bias is not None,
        raw_sigmoid=scoring == "sigmoid" and not renormalize and top_k > 1,
        renormalised_sigmoid_of_one_expert=scoring == "sigmoid" and renormalize and top_k == 1,
        sum_of_other_experts_for_a_group=num_expert_group is not None and counted != wanted,
    )  # fmt: skip
    route = needed("megatron.core.transformer.moe.moe_utils", "topk_routing_with_score_function", INSTALL)
    weights, chosen = route(
        router_logits, top_k, use_pre_softmax=scoring == "softmax" and not renormalize, num_groups=num_expert_group,
        group_topk=topk_group, scaling_factor=routed_scaling_factor, score_function=scoring,
        expert_bias=correction_bias,
    )  # fmt: skip
    ids = chosen.int().topk(top_k, -1).indices
    return weights.gather(-1, ids), ids
