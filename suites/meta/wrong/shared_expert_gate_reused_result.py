"""A gate whose result of four dimensions is kept and handed out again."""

import torch

_kept = {}


def four_dimensions_are_kept(hidden_states, gate_weight, shared_output):
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float().mT)
    out = (gate * shared_output.float()).to(hidden_states.dtype)
    if out.dim() != 4:
        return out
    return _kept.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)
