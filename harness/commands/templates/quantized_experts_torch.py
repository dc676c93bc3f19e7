"""The stage `quantized_experts`: as `experts`, with weights as they are shipped.

    first = W_gate_up[e] @ x_t + bias;  hidden = act(gate) * up;  out[t] = sum of weight * (W_down[e] @ hidden + bias)

Each matrix [N, K] (gate_up: 2I, H; down: H, I) stands for real numbers; this file reads

    fp8_block    float8_e4m3fn [E, N, K], scale fp32 [E, ceil(N/128), ceil(K/128)]: code * scale[n // 128, k // 128]
    fp8_channel  float8_e4m3fn [E, N, K], scale fp32 [E, N]: code * scale[n]

- Other formats (plain, int8_channel, int4_group, mxfp4) are left out of `formats` below, and so not asked for.
- A slot with an id of -1, or one that expert_map sends to -1, adds nothing, whatever its weight holds.
- swiglu_oai: g = min(g, 7), u = clamp(u, -7, 7), hidden = (u + 1) * g * sigmoid(1.702 * g).
- Rows that are quantised on their way into a product are declared: quantized_experts.quantizes = "fp8_group128".
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage quantized_experts --impl FILE:quantized_experts
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def matrix(codes: Tensor, scale: Tensor | None, expert: int, format: str) -> Tensor:
    """The expert's [N, K] in fp32."""
    if scale is None or format not in ("fp8_block", "fp8_channel"):
        raise NotImplementedError(f"format {format}")
    if format == "fp8_channel":
        return codes[expert].float() * scale[expert, :, None]
    rows, columns = (torch.arange(size, device=codes.device) // 128 for size in codes.shape[1:])
    return codes[expert].float() * scale[expert, rows[:, None], columns]


def gated(first: Tensor, activation: str) -> Tensor:
    gate, up = first.chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def quantized_experts(
    hidden_states: Tensor,  # [T, H]
    gate_up_proj: Tensor,  # codes of [E, 2I, H]
    gate_up_scale: Tensor | None,
    down_proj: Tensor,  # codes of [E, H, I]
    down_scale: Tensor | None,
    topk_weights: Tensor,  # [T, k]
    topk_ids: Tensor,  # int [T, k]
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,  # int [E], global to local ids
    gate_up_bias: Tensor | None = None,  # [E, 2I]
    down_bias: Tensor | None = None,  # [E, H]
) -> Tensor:  # [T, H]
    ids = topk_ids
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0).long()])
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in ids[ids >= 0].unique().tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        first = hidden_states[tokens].float() @ matrix(gate_up_proj, gate_up_scale, expert, format).T
        if gate_up_bias is not None:
            first = first + gate_up_bias[expert].float()
        second = gated(first, activation) @ matrix(down_proj, down_scale, expert, format).T
        if down_bias is not None:
            second = second + down_bias[expert].float()
        out.index_add_(0, tokens, second * topk_weights[tokens, slots, None].float())
    return out.to(hidden_states.dtype)


# What it promises; optional, and what is promised is judged.
quantized_experts.formats = ("fp8_block", "fp8_channel")
quantized_experts.rounds = ()
