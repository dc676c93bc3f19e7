"""vLLM's `fused_experts` in 16 bits: Triton kernels with fp32 accumulators, tuned for many devices.

Read and tried in 0.22.1 (docs/released.md).  Products of fp32 operands go through tf32, so fp32 is not declared.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.foreign import no_masked_slot
from moe_harness.impls.vllm import _common

__all__ = ["experts", "permuted"]


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
        NotImplementedError: vllm is not installed, a masked slot, an expert that lives elsewhere.
    """
    no_masked_slot("vllm", topk_ids)
    if expert_map is not None:
        raise NotImplementedError("vllm:permuted is judged without a map")
    permute, unpermute = (_common.of("moe_permute_unpermute", name) for name in ("moe_permute", "moe_unpermute"))
    rows, _, first, inverse, _ = permute(hidden_states, None, topk_ids.int(), len(gate_up_proj))
    outputs = torch.empty_like(rows)
    bounds = first.tolist()
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        gate, up = (rows[begin:end].float() @ gate_up_proj[expert].float().T).chunk(2, -1)
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        outputs[begin:end] = ((act * up) @ down_proj[expert].float().T).to(rows.dtype)
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    unpermute(result, outputs, topk_weights.float(), inverse, first)
    return result


permuted.devices = ("cuda",)
permuted.dtypes = ("fp16", "bf16")
