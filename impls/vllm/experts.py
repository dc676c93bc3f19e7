"""vLLM's `fused_experts` in 16 bits: Triton kernels with fp32 accumulators, tuned for many devices.

Read in 0.22.1; `experts` was tried there (docs/released.md).  Products of fp32 operands go through tf32, so fp32 is not
declared.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.aligned import experts_by_blocks
from moe_harness.impls.foreign import no_masked_slot
from moe_harness.impls.vllm import _common

__all__ = ["aligned", "experts", "permuted"]

BLOCK = 16  # rows of one expert, the smallest that its kernels use


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
        NotImplementedError: vllm is not installed, a masked slot, more than 1,023 experts.
    """
    return _common.run(
        hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, expert_map, None
    )  # fmt: skip


experts.devices = ("cuda",)
experts.dtypes = ("fp16", "bf16")
experts.graph_capturable = True


def permuted(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """`moe_permute` and `moe_unpermute` around plain products: what is judged are those two.

    Raises:
        NotImplementedError: vllm is not installed, a masked slot, an expert that lives elsewhere, rows of no whole 16
            bytes.
    """
    no_masked_slot("vllm", topk_ids)
    if expert_map is not None:
        raise NotImplementedError("vllm:permuted is judged without a map")
    permute, unpermute = (_common.of("moe_permute_unpermute", name) for name in ("moe_permute", "moe_unpermute"))
    if hidden_states.shape[1] * hidden_states.element_size() % 16:
        raise NotImplementedError("vllm permutes rows of whole 16 bytes only")
    rows, _, first, inverse, _ = permute(
        hidden_states.contiguous(), None, topk_ids.int().contiguous(), len(gate_up_proj)
    )  # fmt: skip
    outputs = torch.empty_like(rows)
    bounds = first.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        gate, up = (rows[begin:end].float() @ gate_up_proj[expert].float().T).chunk(2, -1)
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        outputs[begin:end] = ((act * up) @ down_proj[expert].float().T).to(rows.dtype)
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    unpermute(result, outputs, topk_weights.float().contiguous(), inverse, first)
    return result


permuted.devices = ("cuda",)
permuted.dtypes = ("fp16", "bf16")


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
        NotImplementedError: vllm is not installed, a masked slot, more than 1,023 experts.
    """
    no_masked_slot("vllm", topk_ids)
    experts = len(gate_up_proj) if expert_map is None else len(expert_map)
    if experts > _common.MOST_EXPERTS:
        raise NotImplementedError(f"vllm aligns at most {_common.MOST_EXPERTS} experts, not {experts}")
    local = None if expert_map is None else expert_map.int().contiguous()
    slots, owners, total = _common.of("moe_align_block_size", "moe_align_block_size")(
        topk_ids.int().contiguous(), BLOCK, experts, local
    )
    return experts_by_blocks(
        hidden_states, gate_up_proj, down_proj, topk_weights, activation, slots, owners, total, BLOCK
    )


aligned.devices = ("cuda",)
aligned.dtypes = ("fp16", "bf16")
