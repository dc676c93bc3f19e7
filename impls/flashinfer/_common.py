"""FlashInfer's `cutlass_fused_moe`: its first weights are [up; gate], the other way round than a checkpoint's.

Read in 0.7.4 and in the tests of this function there (`w3, w1 = chunk(w31)`, silu of what w1 gives).
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.foreign import needed, no_masked_slot, refuse

INSTALL = "pip install flashinfer-python"


def of(attribute: str) -> Any:
    return needed("flashinfer.fused_moe", attribute, INSTALL)


def halves_swapped(rows: Tensor) -> Tensor:
    """[E, 2N, ...] with the second half of the rows first."""
    gate, up = rows.chunk(2, 1)
    return torch.cat([up, gate], 1)


def run(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    activation: str, expert_map: Tensor | None, **options: Any,
) -> Tensor:  # fmt: skip
    """[T, H], in a tensor of its own; ids int32 and weights fp32, as it takes them.

    Its gated activation is silu, or (clamped up + beta) * clamped gate * sigmoid(alpha * clamped gate) where `options`
    hold one alpha, beta and limit an expert.
    """
    clamped = activation == "swiglu_oai" and "swiglu_limit" in options
    refuse("flashinfer's cutlass_fused_moe", expert_map=expert_map,
           activation_but_silu=activation != "silu" and not clamped)  # fmt: skip
    no_masked_slot("flashinfer", topk_ids)
    result = of("cutlass_fused_moe")(
        input=hidden_states.contiguous(),
        token_selected_experts=topk_ids.int().contiguous(),
        token_final_scales=topk_weights.float().contiguous(),
        fc1_expert_weights=halves_swapped(gate_up_proj),
        fc2_expert_weights=down_proj.contiguous(),
        output_dtype=hidden_states.dtype,
        **options,
    )
    return result[0] if isinstance(result, list | tuple) else result
