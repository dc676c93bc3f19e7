"""The quantised experts on DeepGEMM's grouped fp8 product, `m_grouped_fp8_gemm_nt_contiguous`.

Untried.  Sorting, quantising, the activation and the weighted sum are plain PyTorch:
what is judged are the products.  On Hopper scales stay fp32 (`disable_ue8m0_cast`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.deepgemm import _common
from moe_harness.impls.foreign import no_masked_slot, refuse

__all__ = ["fp8"]


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scales fp32 [M, K / 128]."""
    groups = rows.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448.0
    codes = (groups / torch.where(scale == 0, 1.0, scale)).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale.squeeze(-1)


def _product(rows: Tensor, codes: Tensor, scale: Tensor, m_indices: Tensor) -> Tensor:
    """rows [M, K] and the matrices [E, N, K] of their experts -> [M, N] bf16."""
    out = torch.empty(len(rows), codes.shape[1], dtype=torch.bfloat16, device=rows.device)
    _common.multiply(
        "m_grouped_fp8_gemm_nt_contiguous", _quantised(rows), (codes.contiguous(), scale.contiguous()), out, m_indices,
        disable_ue8m0_cast=True,
    )  # fmt: skip
    return out


def fp8(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_proj: Tensor,
    down_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The stage `quantized_experts` for fp8_block, activations in fp8 by groups of 128.

    Raises:
        NotImplementedError: deep_gemm is not installed, sizes that 128 does not divide, a bias, a map, a masked slot.
    """
    refuse(
        "deep_gemm", expert_map=expert_map, gate_up_bias=gate_up_bias, down_bias=down_bias,
        format_but_fp8_block=format != "fp8_block", clamped_activation=activation == "swiglu_oai",
        part_of_a_block_of_128=bool(down_proj.shape[1] % 128 or down_proj.shape[2] % 128),
    )  # fmt: skip
    assert gate_up_scale is not None and down_scale is not None
    no_masked_slot("deep_gemm", topk_ids)
    tokens, top_k = topk_ids.shape
    if not topk_ids.numel():
        return torch.zeros_like(hidden_states, memory_format=torch.contiguous_format)
    order = topk_ids.long().flatten().argsort(stable=True)
    layout = _common.padded(torch.bincount(topk_ids.long().flatten(), minlength=len(gate_up_proj)))
    rows = _common.spread(hidden_states[order // top_k], layout)
    gate, up = _product(rows, gate_up_proj, gate_up_scale, layout.m_indices).float().chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    hidden = (act * up).where(layout.m_indices[:, None] >= 0, 0.0)  # rows of padding were never written
    outputs = _product(hidden, down_proj, down_scale, layout.m_indices)[layout.to]
    slots = torch.empty_like(outputs)
    slots[order] = outputs
    weighted = slots.view(tokens, top_k, -1).float() * topk_weights.float()[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


fp8.devices = ("cuda",)
fp8.dtypes = ("bf16",)
fp8.formats = ("fp8_block",)
fp8.quantizes = "fp8_group128"
fp8.rounds = ("gate_up", "expert_output")
