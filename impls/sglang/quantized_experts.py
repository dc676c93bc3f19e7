"""SGLang's fused MoE with fp8 blocks, w8a8.  Untried, read where `experts` was."""

from torch import Tensor

from moe_harness.impls.foreign import no_masked_slot, refuse
from moe_harness.impls.sglang.experts import of

__all__ = ["fp8"]


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
        NotImplementedError: sglang is not installed, or anything that it has no argument for.
    """
    refuse(
        "sglang's fp8 path", expert_map=expert_map, gate_up_bias=gate_up_bias, down_bias=down_bias,
        activation_but_silu=activation != "silu", format_but_fp8_block=format != "fp8_block",
        part_of_a_group_of_128=bool(down_proj.shape[1] % 128 or down_proj.shape[2] % 128),
    )  # fmt: skip
    no_masked_slot("sglang", topk_ids)
    return of("fused_moe", "fused_experts_impl")(
        hidden_states.contiguous(), gate_up_proj.contiguous(), down_proj.contiguous(),
        topk_weights.float().contiguous(), topk_ids.int().contiguous(), inplace=False, activation=activation,
        use_fp8_w8a8=True, w1_scale=gate_up_scale, w2_scale=down_scale, block_shape=[128, 128],
    )  # fmt: skip


fp8.devices = ("cuda",)
fp8.dtypes = ("fp16", "bf16")
fp8.formats = ("fp8_block",)
fp8.quantizes = "fp8_group128"
