"""A norm that allocates its result like x and writes it row behind row.

Mistake: where x is a view of heads by tokens, dense but in another order, `empty_like` keeps that order.
"""

import torch


def written_as_if_contiguous(x, weight, *, eps, residual=None):
    total = x.float() if residual is None else x.float() + residual.float()
    right = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
    out = torch.empty_like(x if x.dim() < 2 or x.stride(-1) == 1 else x.contiguous())
    out.as_strided((out.numel(),), (1,)).copy_(right.flatten())
    return out if residual is None else (out, total.to(x.dtype).contiguous())
