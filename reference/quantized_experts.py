r"""The routed experts for weights as they are shipped: codes with scales, biases, a clamped activation.

Each expert's matrix W [N, K] stands for the real numbers of its format (`dequantised`).  With those,

    [g; u] = W_gate_up[e] @ x[t] + gate_up_bias[e]          g, u: [I],  g is the first half
    a      = act(g) * u, or that of swiglu_oai              [I]
    o      = W_down[e] @ a + down_bias[e]                   [H]
    out[t] = sum over slots j of topk_weights[t, j] * o,    e = topk_ids[t, j]  (through expert_map where given)

swiglu_oai (gpt-oss): with g = min(g, 7) and u = clamp(u, -7, 7), a = (u + 1) * g * sigmoid(1.702 * g).
Activations are not quantised here: what an implementation rounds on its way is the harness's to allow.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_harness.reference.experts import activate, local_ids, routed_rows

FORMATS = ("plain", "fp8_block", "fp8_channel", "int8_channel", "int4_group", "mxfp4")
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
BLOCK = 128  # rows and columns under one scale of fp8_block, columns under one of int4_group
MX_BLOCK = 32  # columns under one scale of mxfp4
MX_BIAS = 127  # of the exponent in e8m0
LIMIT = 7.0  # clamp of swiglu_oai
ALPHA = 1.702
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the low three bits; the fourth is the sign


class QuantizedSteps(NamedTuple):
    """Every intermediate value of one expert on its rows; the error model of the harness walks along them."""

    gate: Tensor  # [rows, I], with its bias, before any clamp
    up: Tensor  # [rows, I], likewise
    hidden: Tensor  # what enters the second product, [rows, I]
    output: Tensor  # [rows, H], with its bias


def unpacked(codes: Tensor) -> Tensor:
    """The four-bit values of uint8 [..., K / 2] as int64 [..., K]: the low four bits come first."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()


def dequantised(codes: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The real numbers [..., N, K] that codes and scale stand for, exact in fp64.

    Args:
        codes: of matrices [..., N, K] as the format has them: [..., N, K / 2] where two share a byte.
        scale: None for `plain`; [..., N] per channel, [..., ceil(N / 128), ceil(K / 128)] for `fp8_block`,
            [..., N, K / 128] for `int4_group`, exponents uint8 [..., N, K / 32] for `mxfp4`.

    Raises:
        ValueError: unknown `format`, or a scale where there is none to be and the other way round.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, but should be one of {', '.join(FORMATS)}")
    if (scale is None) != (format == "plain"):
        raise ValueError(f"scale is {'None' if scale is None else 'given'}, but format is {format!r}")
    return scaled(code_values(codes, format, dtype), scale, format)


def code_values(codes: Tensor, format: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """What codes stand for before any scale, [..., N, K]; `codes` as in `dequantised`."""
    if format in ("plain", "int8_channel"):
        return codes.to(dtype)
    byte = torch.arange(256, device=codes.device)
    places = codes.view(torch.uint8).flatten().int()
    if codes.is_floating_point():  # a table of fp8 is four times as fast as a conversion
        return byte.to(torch.uint8).view(codes.dtype).to(dtype).index_select(0, places).view(codes.shape)
    values = [*E2M1, *(-v for v in E2M1)] if format == "mxfp4" else [float(n) for n in range(-8, 8)]
    table = torch.tensor(values, dtype=dtype, device=codes.device)
    pairs = torch.stack([table[byte & 15], table[byte >> 4]], dim=-1)  # what each byte stands for
    return pairs.index_select(0, places).view(*codes.shape[:-1], 2 * codes.shape[-1])


def scaled(values: Tensor, scale: Tensor | None, format: str) -> Tensor:
    """Values [..., N, K] times their scales, in the dtype of `values`; `scale` as in `dequantised`."""
    if scale is None:
        return values
    if format in ("fp8_channel", "int8_channel"):
        return values * scale.to(values.dtype)[..., None]
    if format == "fp8_block":
        return values * over_blocks(scale.to(values.dtype), *values.shape[-2:])
    width, factors = BLOCK, scale.to(values.dtype)
    if format == "mxfp4":
        width, factors = MX_BLOCK, (factors - MX_BIAS).exp2()
    return (values.unflatten(-1, (-1, width)) * factors[..., None]).flatten(-2)


def over_blocks(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [..., R, C] of blocks of 128 by 128 as [..., rows, columns], those of each element."""
    spread = scale[..., :, None, :, None].expand(*scale.shape[:-1], BLOCK, scale.shape[-1], BLOCK)
    return spread.reshape(*scale.shape[:-2], scale.shape[-2] * BLOCK, -1)[..., :rows, :columns]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The hidden values of an expert, elementwise.

    Raises:
        ValueError: unknown `activation`.
    """
    if activation != "swiglu_oai":
        return activate(gate, activation) * up
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * (ALPHA * gate).sigmoid()


def quantized_steps(
    rows: Tensor, gate_up: Tensor, down: Tensor, activation: str, gate_up_bias: Tensor | None, down_bias: Tensor | None
) -> QuantizedSteps:
    """One expert on `rows` [n, H] with dequantised gate_up [2I, H] and down [H, I], in the dtype of `rows`."""
    first = rows @ gate_up.to(rows.dtype).T
    if gate_up_bias is not None:
        first = first + gate_up_bias.to(rows.dtype)
    gate, up = first.chunk(2, dim=-1)
    hidden = gated(gate, up, activation)
    output = hidden @ down.to(rows.dtype).T
    if down_bias is not None:
        output = output + down_bias.to(rows.dtype)
    return QuantizedSteps(gate, up, hidden, output)


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
    """Weighted sum of the chosen experts, whose weights are given as codes and scales.

    Args:
        hidden_states: [T, H]; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        gate_up_proj: codes of [E_local, 2 * I, H], gate rows first; gate_up_scale as `dequantised` says.
        down_proj: codes of [E_local, H, I]; down_scale likewise.
        topk_weights: [T, k].
        topk_ids: [T, k], local ids, or global ones where `expert_map` [E] gives the local id or -1.
        gate_up_bias: [E_local, 2 * I].
        down_bias: [E_local, H].

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: unknown `format` or `activation`, a scale that the format does not have.
    """
    out = torch.zeros_like(hidden_states, memory_format=torch.contiguous_format)
    for expert, tokens, slots in routed_rows(local_ids(topk_ids, expert_map)):
        steps = quantized_steps(
            hidden_states[tokens],
            dequantised(gate_up_proj[expert], _of(gate_up_scale, expert), format, out.dtype),
            dequantised(down_proj[expert], _of(down_scale, expert), format, out.dtype),
            activation, _of(gate_up_bias, expert), _of(down_bias, expert),
        )  # fmt: skip
        out.index_add_(0, tokens, topk_weights[tokens, slots, None].to(out.dtype) * steps.output)
    return out


def _of(tensor: Tensor | None, expert: int) -> Tensor | None:
    return None if tensor is None else tensor[expert]
