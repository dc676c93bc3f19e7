r"""Root mean square normalisation (Zhang and Sennrich, https://arxiv.org/abs/1910.07467), with the residual stream.

s   = x + residual                         (x alone where there is no residual)
out = weight * s / sqrt(mean(s^2) + eps)   the mean over the last dimension
"""

from torch import Tensor


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of x [..., H] in its dtype."""
    return weight.to(x.dtype) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise every row of x.

    Args:
        x: [..., H]; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        weight: [H].
        residual: [..., H], added before the normalisation.

    Returns:
        out [..., H]; with a residual, (out, x + residual).
    """
    if residual is None:
        return normalise(x, weight, eps)
    total = x + residual.to(x.dtype)
    return normalise(total, weight, eps), total
