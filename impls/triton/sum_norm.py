r"""The end of a sparse layer and the norm of the next one in one launch: experts summed, residual added, normalised.

    total[t] = residual[t] + sum over j of w[t, j] * y[t * k + j]        fp32, j ascending, masked slots left out
    out[t]   = weight * total[t] / sqrt(mean(total[t]^2) + eps)

`total` is rounded to its dtype and normalised from there, as in `rms_norm`; the sum itself is not rounded before the
residual is added.  One program has one token, so this is for few of them; a batch of prompts has enough to do in two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    interpreting,
    let_next_start,
    narrow,
    on,
    require,
    require_scale,
)
from moe_harness.impls.triton.alignment import local_expert

__all__ = ["sum_norm"]


@triton.jit
def _sum_norm(
    y, weights, ids, residual, scale, out, total, H, E, eps, id_row, id_col, w_row, w_col, r_row, r_col, s_col,
    K: tl.constexpr, BH: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Token program_id(0)."""
    t = tl.program_id(0)
    column = tl.arange(0, BH)
    inside = column < H
    factor = tl.load(scale + column.to(tl.int64) * s_col, mask=inside, other=0.0).to(tl.float32)
    after_previous(PDL)
    let_next_start(PDL)
    added = tl.load(residual + t.to(tl.int64) * r_row + column.to(tl.int64) * r_col, mask=inside, other=0.0)
    acc = tl.zeros((BH,), tl.float32)
    for j in tl.static_range(K):
        slot = t * K + j
        e = local_expert(ids, ids, slot, slot < (t + 1) * K, K, id_row, id_col, 0, E, False)
        here = e >= 0
        weight = tl.load(weights + t.to(tl.int64) * w_row + j * w_col, mask=here, other=0.0).to(tl.float32)
        row = tl.load(y + slot.to(tl.int64) * H + column, mask=column < tl.where(here, H, 0), other=0.0)
        acc += weight * row.to(tl.float32)
    kept = narrow(acc + added.to(tl.float32), total.dtype.element_ty, WIDEN)
    tl.store(total + t.to(tl.int64) * H + column, kept, mask=inside)
    s = kept.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(s * s, 0) / H + eps)
    tl.store(out + t.to(tl.int64) * H + column, narrow(s * inverse * factor, out.dtype.element_ty, WIDEN), mask=inside)


def sum_norm(
    y: Tensor, topk_weights: Tensor, topk_ids: Tensor, residual: Tensor, weight: Tensor, *, num_experts: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of residual + the experts' weighted sum, and that sum.

    Args:
        y: contiguous [T * k, H], what each slot's expert yields; fp32, fp16 or bf16, as residual [T, H].
        weight: [H], same dtype or fp32.
        topk_weights, topk_ids: [T, k]; slots with an id outside [0, num_experts) are not looked at.

    Returns:
        (out [T, H], total [T, H]), both new.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(y, residual)
    require_scale(residual, weight)
    (tokens, top_k), hidden = topk_ids.shape, y.shape[1]
    wanted = {"y": (y, (tokens * top_k, hidden)), "topk_weights": (topk_weights, (tokens, top_k)),
              "residual": (residual, (tokens, hidden)), "weight": (weight, (hidden,))}  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape}")
    out, total = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    if tokens:
        early, width = early_start(y.device), triton.next_power_of_2(hidden)
        with on(y.device):
            _sum_norm[(tokens,)](
                y, topk_weights, topk_ids, residual, weight, out, total, hidden, num_experts, eps, *topk_ids.stride(),
                *topk_weights.stride(), *residual.stride(), weight.stride(0), K=top_k, BH=width,
                WIDEN=interpreting(), PDL=early, launch_pdl=early, num_warps=max(1, min(8, width // 256)),
            )  # fmt: skip
    return out, total


sum_norm.graph_capturable = True
