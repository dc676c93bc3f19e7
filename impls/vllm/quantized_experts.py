"""vLLM's `fused_experts` for quantised weights: w8a8 in fp8 (blocks, and rows by tokens), w8a8 in int8, w4a16.

Its interface was read in 0.22.1.  `fp8` was timed there (docs/released.md), none of them has been judged yet.
"""

from typing import Any

from torch import Tensor

from moe_harness.impls.foreign import refuse
from moe_harness.impls.vllm import _common

__all__ = ["fp8", "fp8_token", "int4", "int8"]


def _stage(format_wanted: str, configure: Any, quantizes: str | None) -> Any:
    """The stage `quantized_experts` for one format; `configure` makes vLLM's description of the weights."""

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
        refuse("this path of vllm", biases=gate_up_bias, bias=down_bias)
        if format != format_wanted:
            raise NotImplementedError(f"this path of vllm is for {format_wanted}, not {format}")
        hidden, width = down_proj.shape[1], gate_up_proj.shape[1] // 2
        if format == "fp8_block" and (hidden % 128 or width % 128):
            raise NotImplementedError(f"vllm quantises whole groups of 128 columns, not {hidden} and {width}")
        return _common.run(
            hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, expert_map,
            configure(gate_up_scale, down_scale),
        )  # fmt: skip

    quantized_experts.devices = ("cuda",)  # type: ignore[attr-defined]
    quantized_experts.dtypes = ("fp16", "bf16")  # type: ignore[attr-defined]
    quantized_experts.formats = (format_wanted,)  # type: ignore[attr-defined]
    if quantizes is not None:
        quantized_experts.quantizes = quantizes  # type: ignore[attr-defined]
    return quantized_experts


def _fp8_blocks(up: Tensor, down: Tensor) -> object:
    return _common.of("config", "fp8_w8a8_moe_quant_config")(w1_scale=up, w2_scale=down, block_shape=[128, 128])


def _fp8_rows(up: Tensor, down: Tensor) -> object:
    return _common.of("config", "fp8_w8a8_moe_quant_config")(
        w1_scale=up[..., None], w2_scale=down[..., None], per_act_token_quant=True, per_out_ch_quant=True
    )


def _int8_rows(up: Tensor, down: Tensor) -> object:
    return _common.of("config", "int8_w8a8_moe_quant_config")(
        w1_scale=up[..., None], w2_scale=down[..., None], a1_scale=None, a2_scale=None, per_act_token_quant=True
    )


def _int4_groups(up: Tensor, down: Tensor) -> object:
    """Without zero points a code stands for itself less 8."""
    return _common.of("config", "int4_w4a16_moe_quant_config")(
        w1_scale=up, w2_scale=down, w1_zp=None, w2_zp=None, block_shape=[0, 128]
    )


fp8 = _stage("fp8_block", _fp8_blocks, "fp8_group128")
fp8_token = _stage("fp8_channel", _fp8_rows, "fp8_token")
int8 = _stage("int8_channel", _int8_rows, "int8_token")
int4 = _stage("int4_group", _int4_groups, None)
