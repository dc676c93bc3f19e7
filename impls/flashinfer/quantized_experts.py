"""FlashInfer's CUTLASS fused MoE with fp8 blocks as DeepSeek has them, and in 16 bits with biases.

Untried, read in 0.7.4.
"""

import torch
from torch import Tensor

from moe_harness.impls.flashinfer import _common
from moe_harness.impls.foreign import refuse

__all__ = ["fp8", "plain"]

CLAMPED = {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}  # gpt-oss's activation


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
        NotImplementedError: flashinfer is not installed, or anything that it has no argument for.
    """
    refuse(
        "flashinfer's fp8 path", gate_up_bias=gate_up_bias, down_bias=down_bias,
        clamped_activation_beside_scales_of_blocks=activation == "swiglu_oai",
        format_but_fp8_block=format != "fp8_block",
        part_of_a_block_of_128=bool(down_proj.shape[1] % 128 or down_proj.shape[2] % 128),
    )  # fmt: skip
    assert gate_up_scale is not None and down_scale is not None
    scales = [_common.halves_swapped(gate_up_scale), down_scale.contiguous()]
    return _common.run(
        hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, expert_map, quant_scales=scales,
        use_deepseek_fp8_block_scale=True,
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

    Biases are up before gate as the rows are, and in the dtype of the rows: it reads them as that.

    Raises:
        NotImplementedError: flashinfer is not installed, or anything that it has no argument for.
    """
    biases = [bias for bias in (gate_up_bias, down_bias) if bias is not None]
    refuse(
        "flashinfer's cutlass_fused_moe", format_but_plain=format != "plain",
        bias_in_another_dtype_than_the_rows=any(bias.dtype != hidden_states.dtype for bias in biases),
    )  # fmt: skip
    experts, device = len(gate_up_proj), hidden_states.device
    clamped = CLAMPED if activation == "swiglu_oai" else {}
    return _common.run(
        hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, expert_map, quant_scales=[],
        fc1_expert_biases=None if gate_up_bias is None else _common.halves_swapped(gate_up_bias),
        fc2_expert_biases=None if down_bias is None else down_bias.contiguous(),
        **{name: torch.full((experts,), value, device=device) for name, value in clamped.items()},
    )  # fmt: skip


fp8.devices = ("cuda",)
fp8.dtypes = ("bf16",)
fp8.formats = ("fp8_block",)
fp8.quantizes = "fp8_group128"

plain.devices = ("cuda",)
plain.dtypes = ("fp16", "bf16")
plain.formats = ("plain",)
