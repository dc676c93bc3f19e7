"""The experts on an alignment of slots to blocks of one expert each: what is judged of a library is that alignment.

sorted    slots (token * k + j) by expert, each expert's padded to whole blocks by numbers from T * k on
experts   the expert of each block, -1 for one that lives elsewhere
total     entries of `sorted` that mean something
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_by_blocks(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, activation: str,
    sorted_slots: Tensor, experts: Tensor, total: Tensor, block: int,
) -> Tensor:  # fmt: skip
    """hidden_states [T, H] and topk_weights [T, k] -> [T, H], products and sums in fp32."""
    tokens, top_k = topk_weights.shape
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    weights = topk_weights.float().flatten()
    blocks = sorted_slots[: int(total)].view(-1, block)
    for slots, expert in zip(blocks, experts[: len(blocks)].tolist(), strict=True):
        slots = slots[slots < tokens * top_k].long()
        if expert < 0 or not len(slots):
            continue
        rows = slots // top_k
        gate, up = (hidden_states[rows].float() @ gate_up_proj[expert].float().T).chunk(2, -1)
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        out.index_add_(0, rows, weights[slots, None] * ((act * up) @ down_proj[expert].float().T))
    return out.to(hidden_states.dtype)
