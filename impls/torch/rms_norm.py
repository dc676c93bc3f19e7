"""Root mean square normalisation: out = weight * s / sqrt(mean(s^2) + eps), s = x + residual."""

import torch
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The stage `rms_norm`: x and residual [..., H], weight [H] -> out [..., H], or (out, x + residual).

    The sum is rounded to the dtype of x, as it is kept, and normalised from there: the same bits as an addition and a
    normalisation one after the other.  The rest is fp32 and rounded once.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}"
            f"{'' if residual is None else f', residual {tuple(residual.shape)}'}, "
            "but should be [..., H], [H] and, as x, [..., H]"
        )
    total = x if residual is None else x + residual
    out = normalised(total.to(torch.promote_types(x.dtype, torch.float32)), weight, eps).to(x.dtype)
    return out if residual is None else (out, total)


rms_norm.rounds = ("sum",)
rms_norm.deterministic = True
rms_norm.graph_capturable = True


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of x [..., H] in its dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
