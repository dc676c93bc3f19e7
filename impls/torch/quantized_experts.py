"""The routed experts for quantised weights in plain PyTorch: each expert's matrices are dequantised when it is used.

hidden_states [T, H], codes and scales of gate_up_proj [E, 2I, H] and of down_proj [E, H, I] as their format has them,
topk_weights and topk_ids [T, k] -> [T, H].  All of them compute in fp32 and round once, at the end; `fp8_token`,
`fp8_group128` and `int8_token` quantise the rows that enter each product, as kernels for such matrix units do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dequantized", "fp8_group128", "fp8_token", "int8_token"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}

Rows = Callable[[Tensor], Tensor]


def _variant(entering: Rows, quantizes: str | None) -> Callable[..., Tensor]:
    """The stage `quantized_experts`; `entering` is what becomes of the rows that enter a product."""

    def quantized_experts(
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
        ids = topk_ids
        if expert_map is not None:
            ids = torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for expert in ids.unique().tolist():
            if expert < 0:
                continue
            chosen = ids == expert
            tokens = chosen.any(1).nonzero().squeeze(1)
            # where, not a product: the weight of a slot that is not this expert's may be NaN.  A token that chose an
            # expert twice is computed once, with the sum of both weights.
            weight = torch.where(chosen, topk_weights.float(), 0).sum(1)[tokens, None]
            gate_up = dequantise(gate_up_proj[expert], _of(gate_up_scale, expert), format)
            down = dequantise(down_proj[expert], _of(down_scale, expert), format)
            first = _plus(entering(hidden_states[tokens].float()) @ gate_up.T, _of(gate_up_bias, expert))
            output = _plus(entering(_gated(first, activation)) @ down.T, _of(down_bias, expert))
            out[tokens] += weight * output
        return out.to(hidden_states.dtype)

    declarations = {"rounds": (), "deterministic": True} | ({} if quantizes is None else {"quantizes": quantizes})
    vars(quantized_experts).update(declarations)
    return quantized_experts


def _of(tensor: Tensor | None, expert: int) -> Tensor | None:
    return None if tensor is None else tensor[expert]


def _plus(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows + bias.float()


def _quantised(to: torch.dtype, width: int | None) -> Rows:
    """Rows [n, K] in fp32 as codes of `to` times a scale for each `width` columns (None: for each row), which is the
    largest |x| over the largest code."""

    def entering(rows: Tensor) -> Tensor:
        columns = rows.shape[-1]
        across = width or max(1, columns)
        groups = F.pad(rows, (0, -columns % across)).unflatten(-1, (-1, across))
        scale = groups.abs().amax(-1, keepdim=True) / LARGEST[to]
        codes = groups / torch.where(scale == 0, 1.0, scale)
        codes = codes.round() if to == torch.int8 else codes.to(to)
        return (codes.float() * scale).flatten(-2)[..., :columns]

    return entering


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    """The hidden values [..., I] of gate and up [..., 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    raise ValueError(f"activation is {activation!r}, but should be 'silu', 'gelu_tanh' or 'swiglu_oai'")


def dequantise(codes: Tensor, scale: Tensor | None, format: str) -> Tensor:
    """The matrices [..., N, K] in fp32 that codes and scale stand for; a product is rounded once.

    Raises:
        ValueError: unknown `format`.
    """
    if format == "plain":
        return codes.float()
    if scale is None:
        raise ValueError(f"format is {format!r}, which needs scales, but there are none")
    if format in ("fp8_channel", "int8_channel"):
        return codes.float() * scale[..., None]
    if format == "fp8_block":
        n, k = (torch.arange(size, device=codes.device) // 128 for size in codes.shape[-2:])
        return codes.float() * scale[..., n[:, None], k]
    if format == "int4_group":
        return (_halves(codes).float() - 8) * scale.float().repeat_interleave(128, -1)
    if format == "mxfp4":
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
        return table[_halves(codes)] * (scale.float() - 127).exp2().repeat_interleave(32, -1)
    raise ValueError(f"format is {format!r}, but should be one of those of the stage quantized_experts")


def _halves(codes: Tensor) -> Tensor:
    """int64 [..., K] of two four-bit codes a byte, the low four bits first."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()


dequantized = _variant(lambda rows: rows, None)
fp8_token = _variant(_quantised(torch.float8_e4m3fn, None), "fp8_token")
fp8_group128 = _variant(_quantised(torch.float8_e4m3fn, 128), "fp8_group128")
int8_token = _variant(_quantised(torch.int8, None), "int8_token")
