"""FlashInfer's `fused_topk_deepseek`: sigmoid, bias, groups.  Untried, read in 0.7.4."""

import torch
from torch import Tensor

from moe_harness.impls.flashinfer import _common
from moe_harness.impls.foreign import refuse

__all__ = ["fused_topk_deepseek"]


def fused_topk_deepseek(
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
    """router_logits [T, E] -> weights [T, k] fp32, ids [T, k] int32, which it fills; always renormalised."""
    experts, groups = router_logits.shape[1], num_expert_group or 1
    refuse(
        "flashinfer's fused_topk_deepseek", softmax=scoring != "sigmoid", raw_weights=not renormalize,
        call_without_a_bias=correction_bias is None,
        call_without_groups=num_expert_group is None or topk_group is None, more_than_8_experts_a_token=top_k > 8,
        number_of_groups_like_this=groups > 32 or (groups == 1 and experts > 384),
        group_of_more_than_32=groups > 1 and experts > 32 * groups,
        more_than_128_experts_in_the_groups_chosen=groups > 1 and experts // groups * (topk_group or 0) > 128,
    )  # fmt: skip
    assert correction_bias is not None
    size = (len(router_logits), top_k)
    weights = torch.empty(size, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(size, dtype=torch.int32, device=router_logits.device)
    _common.of("fused_topk_deepseek")(
        scores=router_logits.contiguous(), bias=correction_bias.to(router_logits.dtype).contiguous(),
        n_group=num_expert_group, topk_group=topk_group,
        topk=top_k, routed_scaling_factor=routed_scaling_factor, topk_values=weights, topk_indices=ids,
    )  # fmt: skip
    return weights, ids


fused_topk_deepseek.devices = ("cuda",)
