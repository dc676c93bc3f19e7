"""SGLang's fused MoE in 16 bits, `fused_experts_impl` of its Triton runner, and its alignment.  Untried.

Read in 0.5.3 and 0.5.23, which keeps the function in another module.  There it also reads what a server has published
and a process group, so that outside of one it is refused with sglang's own words.  Triton kernels with the alignment of
sglang-kernel.  Rows of gate_up are [gate; up]; ids are int32.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.aligned import experts_by_blocks
from moe_harness.impls.foreign import needed, refuse

__all__ = ["aligned", "experts"]

FOLDERS = ("moe_runner.triton_utils", "fused_moe_triton")  # where newer and older versions keep the same functions
INSTALL = "pip install sglang==0.5.3"
BLOCK = 16


def of(module: str, attribute: str) -> Any:
    """`attribute` of a module of its Triton runner, in whichever folder this version has it."""
    newer, older = (f"sglang.srt.layers.moe.{folder}.{module}" for folder in FOLDERS)
    try:
        return needed(newer, attribute, INSTALL)
    except NotImplementedError:
        return needed(older, attribute, INSTALL)


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """int32 ids of the experts held here, -1 for any other slot: what sglang's own dispatcher gives its kernels.

    Its alignment counts ids from -1 on, and of a block of -1 both products write zeros without a look at its weights.
    """
    if expert_map is not None:
        topk_ids = torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
    return topk_ids.int().contiguous()


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
        NotImplementedError: sglang is not installed, or another activation than silu; its gelu is the exact one.
    """
    refuse("sglang's fused_experts_impl", activation_but_silu=activation != "silu")
    return of("fused_moe", "fused_experts_impl")(
        hidden_states.contiguous(), gate_up_proj.contiguous(), down_proj.contiguous(),
        topk_weights.float().contiguous(), local_ids(topk_ids, expert_map), inplace=False, activation=activation,
    )  # fmt: skip


experts.devices = ("cuda",)
experts.dtypes = ("fp16", "bf16")


def aligned(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """`moe_align_block_size` before plain products: what is judged is that alignment.

    Raises:
        NotImplementedError: sglang is not installed.
    """
    slots, owners, total = of("moe_align_block_size", "moe_align_block_size")(
        local_ids(topk_ids, expert_map), BLOCK, len(gate_up_proj)
    )
    return experts_by_blocks(
        hidden_states, gate_up_proj, down_proj, topk_weights, activation, slots, owners, total, BLOCK
    )


aligned.devices = ("cuda",)
aligned.dtypes = ("fp16", "bf16")
