"""SGLang's fused MoE with fp8 blocks, w8a8, and in 16 bits with biases.  Untried, read where `experts` was."""

import torch
from torch import Tensor

from moe_harness.impls.foreign import refuse
from moe_harness.impls.sglang.experts import local_ids, of

__all__ = ["fp8", "plain"]

# gpt-oss's activation, (clamped up + 1) * clamped gate * sigmoid(alpha * clamped gate), of rows gate, up, gate, ...
CLAMPED = {"gemm1_alpha": 1.702, "gemm1_limit": 7.0}


def interleaved(rows: Tensor) -> Tensor:
    """[E, 2N, ...], first half gate, as gate and up in turn."""
    return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2)


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
    """The stage `quantized_experts` for fp8_block and silu, activations in fp8 by groups of 128.

    Raises:
        NotImplementedError: sglang is not installed, or anything that it has no argument for.  Its clamped activation
            reads gate and up in turn: rows of two blocks would share one scale.
    """
    refuse(
        "sglang's fp8 path", gate_up_bias=gate_up_bias, down_bias=down_bias,
        clamped_activation_beside_scales_of_blocks=activation == "swiglu_oai",
        activation_but_silu=activation != "silu", format_but_fp8_block=format != "fp8_block",
        part_of_a_group_of_128=bool(down_proj.shape[1] % 128 or down_proj.shape[2] % 128),
    )  # fmt: skip
    return of("fused_moe", "fused_experts_impl")(
        hidden_states.contiguous(), gate_up_proj.contiguous(), down_proj.contiguous(),
        topk_weights.float().contiguous(), local_ids(topk_ids, expert_map), inplace=False, activation=activation,
        use_fp8_w8a8=True, w1_scale=gate_up_scale, w2_scale=down_scale, block_shape=[128, 128],
    )  # fmt: skip


def plain(
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
    """The stage `quantized_experts` for plain weights, silu or swiglu_oai, with or without biases.

    For swiglu_oai the rows of the first weights are interleaved in every call: judge it, but time it with `experts`.

    Raises:
        NotImplementedError: sglang is not installed, another format, gelu.
    """
    refuse(
        "sglang's fused_experts_impl", format_but_plain=format != "plain",
        activation_but_silu_and_swiglu_oai=activation not in ("silu", "swiglu_oai"),
    )  # fmt: skip
    clamped = activation == "swiglu_oai"
    first = interleaved(gate_up_proj) if clamped else gate_up_proj
    first_bias = interleaved(gate_up_bias) if clamped and gate_up_bias is not None else gate_up_bias
    return of("fused_moe", "fused_experts_impl")(
        hidden_states.contiguous(), first.contiguous(), down_proj.contiguous(), topk_weights.float().contiguous(),
        local_ids(topk_ids, expert_map), b1=None if first_bias is None else first_bias.contiguous(),
        b2=None if down_bias is None else down_bias.contiguous(), inplace=False, activation="silu",
        **(CLAMPED if clamped else {}),
    )  # fmt: skip


fp8.devices = ("cuda",)
fp8.dtypes = ("fp16", "bf16")
fp8.formats = ("fp8_block",)
fp8.quantizes = "fp8_group128"

plain.devices = ("cuda",)
plain.dtypes = ("fp16", "bf16")
plain.formats = ("plain",)
