"""SGLang's fused MoE in 16 bits, `fused_experts_impl` of its Triton runner.  Untried: written against its interface.

Triton kernels with the alignment of sglang-kernel.  Rows of gate_up are [gate; up]; ids are int32.
"""

from torch import Tensor

from moe_harness.impls.foreign import needed, no_masked_slot, refuse

__all__ = ["experts"]

MODULE, INSTALL = "sglang.srt.layers.moe.fused_moe_triton.fused_moe", "pip install sglang"


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts`: hidden_states [T, H], gate_up_proj [E, 2I, H], down_proj [E, H, I] -> [T, H].

    Raises:
        NotImplementedError: sglang is not installed, a masked slot, a map, another activation than silu.
    """
    refuse("sglang's fused_experts_impl", expert_map=expert_map, activation_but_silu=activation != "silu")
    no_masked_slot("sglang", topk_ids)
    return needed(MODULE, "fused_experts_impl", INSTALL)(
        hidden_states, gate_up_proj.contiguous(), down_proj.contiguous(), topk_weights.float(), topk_ids.int(),
        inplace=False, activation=activation,
    )  # fmt: skip


experts.devices = ("cuda",)
experts.dtypes = ("fp16", "bf16")
