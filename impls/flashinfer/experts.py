"""FlashInfer's CUTLASS fused MoE in 16 bits.  Untried, read in 0.7.4."""

from torch import Tensor

from moe_harness.impls.flashinfer import _common

__all__ = ["experts"]


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
    """The stage `experts`.  The halves are swapped in every call: judge it, but time it with weights swapped before.

    Raises:
        NotImplementedError: flashinfer is not installed, a masked slot, a map, another activation than silu.
    """
    return _common.run(
        hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, expert_map, quant_scales=[]
    )


experts.devices = ("cuda",)
experts.dtypes = ("fp16", "bf16")
