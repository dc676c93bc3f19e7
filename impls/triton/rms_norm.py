r"""Root mean square normalisation, with the addition of the residual in the same kernel.

    s = x + residual,  out = weight * s / sqrt(mean(s^2) + eps)      fp32, each result rounded once

The sum is rounded to its dtype first and normalised from there, so that a layer with and without the fusion gives the
same bits.  Rows longer than LONGEST do not fit in the registers of one program, and are left to the plain expression.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
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

__all__ = ["rms_norm"]  # what is registered

LONGEST = 16384


@triton.jit
def _norm_rows(
    x, residual, weight, out, total, rows, H, eps, x_part, x_row, x_col, r_row, r_col, w_col,
    PARTS: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BM rows of H columns, each the sum of PARTS; results are contiguous."""
    after_previous(PDL)
    let_next_start(PDL)
    column = tl.arange(0, BH)
    scale = tl.load(weight + column.to(tl.int64) * w_col, mask=column < H, other=0.0)
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    live = (row < rows) & (column < H)[None, :]
    at = x + row * x_row + column[None, :].to(tl.int64) * x_col
    if ADD:
        added = tl.load(residual + row * r_row + column[None, :].to(tl.int64) * r_col, mask=live, other=0.0)
    s = tl.load(at, mask=live, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        s += tl.load(at + part * x_part, mask=live, other=0.0)
    if ADD:
        kept = narrow(s + added.to(tl.float32), total.dtype.element_ty, WIDEN)
        tl.store(total + row * H + column[None, :], kept, mask=live)
        s = kept.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / H + eps)
    result = s * inverse[:, None] * scale.to(tl.float32)[None, :]
    tl.store(out + row * H + column[None, :], narrow(result, out.dtype.element_ty, WIDEN), mask=live)


def _plain(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.float()
    out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype).contiguous()
    return out if residual is None else (out, total)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The stage `rms_norm`.

    Args:
        x: [..., H], fp32, fp16 or bf16, any strides (leading dimensions that cannot be folded are copied).
        weight: [H], same dtype or fp32.
        residual: [..., H], same dtype.

    Returns:
        New contiguous out [..., H]; with a residual, (out, x + residual).

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(x, *(() if residual is None else (residual,)))
    require_scale(x, weight)
    hidden = x.shape[-1]
    if tuple(weight.shape) != (hidden,):
        raise ValueError(f"weight is {tuple(weight.shape)}, but should be {(hidden,)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, but should be as x, {tuple(x.shape)}")
    if not 0 < hidden <= LONGEST:
        return _plain(x, weight, eps, residual)
    if x.numel() == 0:
        return _plain(x, weight, eps, residual)
    rows = x.reshape(1, -1, hidden)
    if residual is None:
        return _normed((rows, weight, None), eps).view(x.shape)
    out, total = _normed((rows, weight, residual.reshape(-1, hidden)), eps)
    return out.view(x.shape), total.view(x.shape)


def norm_of_parts(parts: Tensor, weight: Tensor, residual: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + the sum of parts, and that sum, rounded only then: what follows a `projection`.

    Args:
        parts: fp32 [n, T, H].
        weight: [H], in the dtype of residual or fp32.
        residual: [T, H].

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(residual)
    require_scale(residual, weight)
    if parts.ndim != 3 or parts.dtype != torch.float32 or not 0 < parts.shape[2] <= LONGEST:
        raise ValueError(f"parts are {parts.dtype} {tuple(parts.shape)}, but should be fp32 [n, T, H], H to {LONGEST}")
    if residual.shape != parts.shape[1:] or weight.shape != parts.shape[2:]:
        raise ValueError(
            f"residual and weight are {tuple(residual.shape)} and {tuple(weight.shape)}, but should be "
            f"{tuple(parts.shape[1:])} and {tuple(parts.shape[2:])}"
        )
    return _normed((parts, weight, residual), eps)


@Repeated
def _normed(parts: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of the sum of parts [n, T, H] and residual [T, H]; with a residual, that sum too."""
    _, rows, hidden = parts.shape
    kept = parts if residual is None else residual
    out = empty(kept, rows, hidden)
    total = out if residual is None else empty(kept, rows, hidden)
    if rows:
        width = triton.next_power_of_2(hidden)
        tall = 8 if interpreting() else max(1, 512 // width)
        early = early_start(parts.device)
        added = weight[None] if residual is None else residual
        with on(parts.device):
            launch(
                _norm_rows, (triton.cdiv(rows, tall),), parts, added, weight, out, total, rows, hidden, eps,
                *parts.stride(), *added.stride(), weight.stride(0), PARTS=len(parts), ADD=residual is not None,
                BM=tall, BH=width, WIDEN=interpreting(), PDL=early, launch_pdl=early,
                num_warps=max(1, min(16, width // 512)),
            )  # fmt: skip
    return out if residual is None else (out, total)


rms_norm.rounds = ("sum",)
rms_norm.deterministic = True
rms_norm.batch_invariant = True
rms_norm.graph_capturable = True
