"""The routers of sglang-kernel (`sgl_kernel`): `topk_softmax`, `topk_sigmoid`, `moe_fused_gate`.

Untried.  Read in sgl-kernel 0.3.14, the package's name with sglang 0.5.3; `topk_sigmoid` came behind it.  The first two
fill tensors that they are given.
"""

import torch
from torch import Tensor

from moe_harness.impls.foreign import needed, refuse

__all__ = ["moe_fused_gate", "topk_sigmoid", "topk_softmax"]

INSTALL = "pip install sglang-kernel"


def _empty(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights fp32 and ids int32, [T, k], to be filled."""
    size, device = (len(logits), top_k), logits.device
    return torch.empty(size, dtype=torch.float32, device=device), torch.empty(size, dtype=torch.int32, device=device)


def topk_softmax(
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
    """router_logits [T, E] -> weights [T, k] fp32, ids [T, k] int32."""
    refuse(
        "sgl_kernel's topk_softmax", correction_bias=correction_bias, groups=num_expert_group,
        routed_scaling_factor=routed_scaling_factor != 1.0, sigmoid=scoring != "softmax",
    )  # fmt: skip
    weights, ids = _empty(router_logits, top_k)
    needed("sgl_kernel", "topk_softmax", INSTALL)(weights, ids, router_logits.contiguous(), renormalize)
    return weights, ids


def topk_sigmoid(
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
    """As `topk_softmax` with sigmoid; the bias [E] is fp32 there."""
    refuse(
        "sgl_kernel's topk_sigmoid", groups=num_expert_group, routed_scaling_factor=routed_scaling_factor != 1.0,
        softmax=scoring != "sigmoid",
    )  # fmt: skip
    weights, ids = _empty(router_logits, top_k)
    bias = None if correction_bias is None else correction_bias.float().contiguous()
    needed("sgl_kernel", "topk_sigmoid", INSTALL)(weights, ids, router_logits.contiguous(), renormalize, bias)
    return weights, ids


def moe_fused_gate(
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
    """DeepSeek-V3's routing: sigmoid, bias and groups of at most 32 of 2^n experts; always renormalised."""
    experts, groups = router_logits.shape[1], num_expert_group or 1
    refuse(
        "sgl_kernel's moe_fused_gate", softmax=scoring != "sigmoid", call_without_a_bias=correction_bias is None,
        call_without_groups=num_expert_group is None or topk_group is None, raw_weights=not renormalize,
        number_of_experts_but_a_power_of_two=experts & (experts - 1) != 0,
        group_of_more_than_32=experts > 32 * groups,
    )  # fmt: skip
    assert correction_bias is not None
    return needed("sgl_kernel", "moe_fused_gate", INSTALL)(
        router_logits.contiguous(), correction_bias.to(router_logits.dtype).contiguous(), num_expert_group, topk_group,
        top_k, num_fused_shared_experts=0, routed_scaling_factor=routed_scaling_factor,
        apply_routed_scaling_factor_on_output=True,
    )  # fmt: skip


topk_softmax.devices = ("cuda",)
topk_sigmoid.devices = ("cuda",)
moe_fused_gate.devices = ("cuda",)
