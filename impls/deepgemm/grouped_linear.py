"""DeepGEMM's grouped product in bf16, `m_grouped_bf16_gemm_nt_contiguous`.  Untried."""

import torch
from torch import Tensor

from moe_harness.impls.deepgemm import _common
from moe_harness.impls.foreign import refuse

__all__ = ["grouped_linear"]


def grouped_linear(x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x [S, K], weight [E, N, K], group_sizes [E] -> [S, N].

    Raises:
        NotImplementedError: deep_gemm is not installed, a bias, sizes that the copy engine does not take.
    """
    odd = bool(x.shape[1] % 8 or weight.shape[1] % 8)
    refuse("deep_gemm's grouped product", bias=bias, K_or_N_that_8_does_not_divide=odd)
    layout = _common.padded(group_sizes.long())
    out = torch.empty(len(layout.m_indices), weight.shape[1], dtype=x.dtype, device=x.device)
    if len(x):
        _common.multiply(
            "m_grouped_bf16_gemm_nt_contiguous", _common.spread(x, layout), weight.contiguous(), out, layout.m_indices
        )
    return out[layout.to]


grouped_linear.devices = ("cuda",)
grouped_linear.dtypes = ("bf16",)
grouped_linear.rounds = ()
