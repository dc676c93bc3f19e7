"""The stage `shared_expert_gate` in Triton: the scalar gate of the shared expert.

    out = sigmoid(hidden_states @ gate_weight.T) * shared_output

- Any strides, any number of leading dimensions; D may differ from H.
- The output is a new tensor in the dtype of shared_output; no input is modified.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage shared_expert_gate --impl FILE:shared_expert_gate --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage shared_expert_gate --impl FILE:shared_expert_gate   (without a GPU)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _gate(x, w, y, out, H, D, x_t, x_h, w_h, y_t, y_d, TILE: tl.constexpr):
    """One row: its dot product with the gate's weight, then its columns."""
    row = tl.program_id(0).to(tl.int64)
    logit = tl.zeros((TILE,), tl.float32)
    for start in range(0, H, TILE):
        at = start + tl.arange(0, TILE)
        a = tl.load(x + row * x_t + at * x_h, mask=at < H, other=0.0).to(tl.float32)
        logit += a * tl.load(w + at * w_h, mask=at < H, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.sum(logit))
    for start in range(0, D, TILE):
        at = start + tl.arange(0, TILE)
        value = gate * tl.load(y + row * y_t + at * y_d, mask=at < D, other=0.0).to(tl.float32)
        tl.store(out + row * D + at, value, mask=at < D)


def shared_expert_gate(
    hidden_states: Tensor,  # [..., H]
    gate_weight: Tensor,  # [1, H]
    shared_output: Tensor,  # [..., D]
) -> Tensor:  # [..., D]
    x, y = hidden_states.reshape(-1, hidden_states.shape[-1]), shared_output.reshape(-1, shared_output.shape[-1])
    out = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    if len(y):
        _gate[len(y),](x, gate_weight, y, out, x.shape[1], y.shape[1], *x.stride(), gate_weight.stride(1), *y.stride(),
                       BLOCK)  # fmt: skip
    # To be stored in the dtype of shared_output by the kernel; the interpreter cuts bf16 off instead of rounding.
    return out.to(y.dtype).view(shared_output.shape)


# What it promises; optional, and what is promised is judged.
shared_expert_gate.deterministic = True
