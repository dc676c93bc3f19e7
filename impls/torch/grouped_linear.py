"""One linear layer per expert over rows sorted by expert: x [S, K], weight [E, N, K], group_sizes [E] -> [S, N]."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["loop", "grouped_mm"]

ALIGNMENT = 16  # bytes; torch's grouped GEMM wants every row of both operands to start on such a boundary


def loop(x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The stage `grouped_linear`, one product per expert in fp32 and a single rounding at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        rows = x[start : start + size].to(wide) @ weight[expert].to(wide).T
        out[start : start + size] = rows if bias is None else rows + bias[expert].to(wide)
        start += size
    return out


loop.rounds = ()
loop.deterministic = True


def grouped_mm(x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The stage `grouped_linear` through torch's grouped GEMM.

    A bias is added in fp32 to the product, which the GEMM has rounded to the dtype of x already.

    Raises:
        NotImplementedError: fp64, which the GEMM does not take.
    """
    ends = group_sizes.cumsum(0)
    out = product(x, weight, ends)
    if bias is None:
        return out
    rows = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(ends, rows, right=True)
    return (out.float() + bias[expert].float()).to(out.dtype)


grouped_mm.deterministic = True


def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e - 1] .. ends[e] of x [S, K] times weight[e].T, [S, N]; rows behind ends[-1] are left undefined.

    The GEMM needs unit stride along K and rows on 16-byte boundaries.  An operand that has neither is copied into a
    buffer that does, with K padded by zeros, which add nothing: both operands are zero there, even beside infinities.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotImplementedError(f"torch's grouped_mm takes fp32, fp16 and bf16, not {x.dtype}")
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return x.new_empty(x.shape[0], weight.shape[1])
    call = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return call(_aligned(x), _aligned(weight).transpose(-2, -1), offs=ends.to(torch.int32))


def _aligned(operand: Tensor) -> Tensor:
    """`operand` [..., K] itself where the GEMM takes it, else a copy with K rounded up to 16 bytes."""
    columns, unit = operand.shape[-1], ALIGNMENT // operand.element_size()
    dense = operand.stride(-1) == 1 and operand.stride(-2) >= columns and operand.data_ptr() % ALIGNMENT == 0
    if columns % unit == 0 and dense and all(stride % unit == 0 for stride in operand.stride()[:-1]):
        return operand
    padded = operand.new_zeros(*operand.shape[:-1], columns + -columns % unit)
    padded[..., :columns] = operand
    return padded
