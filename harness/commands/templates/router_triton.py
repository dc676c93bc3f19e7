"""The stage `router` in Triton: from each token's logits to k experts and their weights.

    scores  = softmax(logits) over all E, or sigmoid(logits), in fp32
    chosen  = the top_k by scores + correction_bias, inside the best groups
    weights = scores[chosen]  / their sum (renormalize)  * routed_scaling_factor

- The bias decides who is chosen and never enters the weights.
- Groups (num_expert_group, topk_group): refused here; `moe-harness init router` has them in PyTorch.
- ids are distinct, int32 or int64, in any order, paired with the weights.  Among equal scores any choice is right.
- A row that holds NaN: ids distinct and in range all the same; other rows unaffected.  T = 0 gives empty tensors.

    moe-harness check --stage router --impl FILE:router --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage router --impl FILE:router        (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route(logits, bias, weights, ids, E, k, t_stride, e_stride, b_stride, scale,
           SIGMOID: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One token: its scores in registers, then k times the best that is left."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    here = at < E
    x = tl.load(logits + row * t_stride + at * e_stride, mask=here, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        powers = tl.exp(x - tl.max(x, 0))
        scores = powers / tl.sum(powers, 0)
    choice = scores
    if BIASED:
        choice = scores + tl.load(bias + at * b_stride, mask=here, other=0.0).to(tl.float32)
    # NaN would never be the best and -inf may be a real score, so what is left is known by itself.
    choice = tl.where(choice == choice, choice, -float("inf"))
    left = here
    total = 0.0
    for j in range(k):
        best = tl.max(tl.where(left, choice, -float("inf")), 0)
        chosen = tl.min(tl.where(left & (choice == best), at, TILE), 0)
        weight = tl.sum(tl.where(at == chosen, scores, 0.0), 0)
        left = left & (at != chosen)
        total += weight
        tl.store(ids + row * k + j, chosen.to(tl.int64))
        tl.store(weights + row * k + j, weight)
    if RENORMALIZE:
        scale = scale / total
    for j in range(k):
        tl.store(weights + row * k + j, tl.load(weights + row * k + j) * scale)


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
    if num_expert_group is not None and num_expert_group > 1:
        raise NotImplementedError("groups of experts")
    T, E = router_logits.shape
    weights = torch.empty(T, top_k, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(T, top_k, dtype=torch.int64, device=router_logits.device)
    if T:
        bias = router_logits if correction_bias is None else correction_bias
        _route[T,](router_logits, bias, weights, ids, E, top_k, *router_logits.stride(), bias.stride(-1),
                   float(routed_scaling_factor), scoring == "sigmoid", correction_bias is not None, renormalize,
                   triton.next_power_of_2(E))  # fmt: skip
    return weights, ids


# What it promises; optional, and what is promised is judged.
router.deterministic = True
