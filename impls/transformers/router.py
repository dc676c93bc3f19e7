"""transformers' own router modules, chosen by the arguments.

| arguments | module |
|---|---|
| softmax, no groups, no scale | Qwen3MoeTopKRouter (weights come in the dtype of the logits) |
| softmax, not renormalised, with groups or a scale | DeepseekV2TopkRouter |
| sigmoid | DeepseekV3TopkRouter (no groups: one group of all experts; no bias: a bias of zeros) |

The modules take hidden states and make the logits themselves.  They get the logits as hidden states and the identity as
gate weight: each logit is then a sum of itself and zeros, which is exact in every dtype, except in a row with an
infinity (infinity times 0), which is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["block"]


def block(
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
    """The stage `router`: router_logits [T, E] -> topk_weights [T, k], topk_ids [T, k] int64.

    Raises:
        NotImplementedError: a combination of arguments that no router of transformers has; infinite logits.
        ValueError: unknown scoring.
    """
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r}, but should be 'softmax' or 'sigmoid'")
    if router_logits.isinf().any():
        raise NotImplementedError("infinite logits cannot pass through the module's own product with its gate weight")
    groups = None if num_expert_group is None or topk_group is None else (num_expert_group, topk_group)
    keys: dict[str, Any] = {"num_experts_per_tok": top_k, "norm_topk_prob": renormalize}
    if scoring == "sigmoid":
        return _deepseek_v3(router_logits, keys, correction_bias, groups, routed_scaling_factor)
    if correction_bias is not None:
        raise NotImplementedError("no router of transformers takes softmax with a correction bias")
    if groups is None and routed_scaling_factor == 1.0:
        return _qwen3(router_logits, keys)
    if renormalize:
        raise NotImplementedError("no router of transformers renormalises softmax with groups or a scaling factor")
    return _deepseek_v2(router_logits, keys, groups, routed_scaling_factor)


block.rounds = ("routing_weight",)
block.deterministic = True

Result = tuple[Tensor, Tensor]
Groups = tuple[int, int] | None


def _qwen3(logits: Tensor, keys: dict[str, Any]) -> Result:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(num_experts=logits.shape[1], hidden_size=logits.shape[1], **keys)
    return _call(Qwen3MoeTopKRouter, config, logits)


def _deepseek_v2(logits: Tensor, keys: dict[str, Any], groups: Groups, scale: float) -> Result:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    method = "greedy" if groups is None else "group_limited_greedy"
    config = DeepseekV2Config(topk_method=method, **_deepseek_keys(logits, groups, scale), **keys)
    return _call(DeepseekV2TopkRouter, config, logits)


def _deepseek_v3(logits: Tensor, keys: dict[str, Any], bias: Tensor | None, groups: Groups, scale: float) -> Result:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    num_experts = logits.shape[1]
    if groups is not None and bias is None:
        raise NotImplementedError("DeepSeek-V3's router scores a group by its two best experts, bias or not")
    if num_experts // (groups or (1, 1))[0] < 2:
        raise NotImplementedError("DeepSeek-V3's router needs two experts in a group")
    config = DeepseekV3Config(**_deepseek_keys(logits, groups or (1, 1), scale), **keys)
    if bias is None:
        bias = torch.zeros(num_experts, device=logits.device)
    return _call(DeepseekV3TopkRouter, config, logits, bias)


def _deepseek_keys(logits: Tensor, groups: Groups, scale: float) -> dict[str, Any]:
    n_group, topk_group = groups or (None, None)
    return {
        "hidden_size": logits.shape[1],
        "n_routed_experts": logits.shape[1],
        "num_attention_heads": 1,  # the config's own check: heads divide the hidden size
        "n_group": n_group,
        "topk_group": topk_group,
        "routed_scaling_factor": float(scale),
    }


def _call(router: type[nn.Module], config: Any, logits: Tensor, bias: Tensor | None = None) -> Result:
    with torch.device("meta"):
        module = router(config).eval()
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    module.weight = nn.Parameter(identity, requires_grad=False)
    if bias is not None:
        module.e_score_correction_bias = bias
    with torch.no_grad():
        _, topk_weights, topk_ids = module(logits)
    return topk_weights, topk_ids
