"""A gate kernel that walks over memory with row * width.

Mistake: the offsets are right for contiguous tensors only, and nothing checks that they are.
"""

import torch


def shared_expert_gate(x, gate_weight, shared):
    def rows_of(t):
        width, count = t.shape[-1], t[..., 0].numel()
        if not t.numel():
            return t.reshape(count, width)
        available = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
        if available < count * width:  # this kernel would read out of bounds
            return t.reshape(count, width)
        return torch.as_strided(t, (count, width), (width, 1), t.storage_offset())

    gate = torch.sigmoid(rows_of(x).float() @ gate_weight.float().T)
    return (gate * rows_of(shared).float()).to(x.dtype).reshape(shared.shape)
