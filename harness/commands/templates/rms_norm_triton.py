"""The stage `rms_norm` in Triton: root mean square normalisation, with the residual added first where there is one.

    s = x + residual;  out = weight * s / sqrt(mean(s^2) + eps) over the last dimension

- Returns out, or (out, s) where a residual is given; s is what the next layer adds to.
- Any number of leading dimensions, zero rows among them; any strides.
- New tensors in the dtype of x; no input is modified.  The mean is taken in at least fp32.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage rms_norm --impl FILE:rms_norm --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage rms_norm --impl FILE:rms_norm   (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(x, residual, weight, out, total, H, eps, x_t, x_h, r_t, r_h, w_h, ADDS: tl.constexpr, TILE: tl.constexpr):
    """One row, all of it in registers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    here = at < H
    s = tl.load(x + row * x_t + at * x_h, mask=here, other=0.0).to(tl.float32)
    if ADDS:
        s += tl.load(residual + row * r_t + at * r_h, mask=here, other=0.0).to(tl.float32)
        tl.store(total + row * H + at, s, mask=here)
    root = tl.sqrt(tl.sum(s * s, 0) / H + eps)
    w = tl.load(weight + at * w_h, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * H + at, w * (s / root), mask=here)


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    *,
    eps: float,
    residual: Tensor | None = None,  # as x
) -> Tensor | tuple[Tensor, Tensor]:
    H = x.shape[-1]
    rows = x.reshape(-1, H)
    added = rows if residual is None else residual.reshape(-1, H)
    out = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    total = torch.empty_like(out)
    if len(rows):
        _norm[len(rows),](rows, added, weight, out, total, H, float(eps), *rows.stride(), *added.stride(),
                          weight.stride(0), residual is not None, triton.next_power_of_2(H))  # fmt: skip
    # To be stored in the dtype of x by the kernel; the interpreter cuts bf16 off instead of rounding.
    result = out.to(x.dtype).view(x.shape)
    return result if residual is None else (result, total.to(x.dtype).view(x.shape))


# What it promises; optional, and what is promised is judged.  The sum is normalised before it is rounded.
rms_norm.rounds = ()
rms_norm.deterministic = True
