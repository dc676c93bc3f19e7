"""The stage `rms_norm`: root mean square normalisation, with the residual added first where there is one.

    s = x + residual;  out = weight * s / sqrt(mean(s^2) + eps) over the last dimension

- Returns out, or (out, s) where a residual is given; s is what the next layer adds to.
- Any number of leading dimensions, zero rows among them; any strides.
- New tensors in the dtype of x; no input is modified. The mean is taken in at least fp32.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage rms_norm --impl FILE:rms_norm
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    *,
    eps: float,
    residual: Tensor | None = None,  # as x
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return out.to(x.dtype) if residual is None else (out.to(x.dtype), total)


# What it promises; optional, and what is promised is judged. The sum is normalised as it is kept, in the dtype of x.
rms_norm.rounds = ("sum",)
rms_norm.deterministic = True
