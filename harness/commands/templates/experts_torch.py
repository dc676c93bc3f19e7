"""The stage `experts`: the routed experts of a Mixture-of-Experts layer.

out[t] = sum over j of topk_weights[t, j] * down_proj[e] @ (act(g) * u),  e = topk_ids[t, j]
         [g; u] = gate_up_proj[e] @ hidden_states[t], g its first I rows

- expert_map: int [E_global]; topk_ids are global then and e = expert_map[id].
- An id of -1, or one mapped to -1, contributes nothing, whatever its weight (NaN too).  A repeated id counts twice.
- activation: "silu" or "gelu_tanh".  Any strides; T = 0, k = E and experts without tokens are ordinary inputs.
- The output is a new tensor in the dtype of hidden_states; no input is modified.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage experts --impl FILE:experts
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def experts(
    hidden_states: Tensor,  # [T, H]
    gate_up_proj: Tensor,  # [E, 2 * I, H]
    down_proj: Tensor,  # [E, H, I]
    topk_weights: Tensor,  # [T, k]
    topk_ids: Tensor,  # [T, k]
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:  # [T, H]
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        chosen = ids == expert
        tokens = chosen.any(1).nonzero().squeeze(1)
        weight = topk_weights.float().masked_fill(~chosen, 0).sum(1)[tokens, None]
        g, u = (hidden_states[tokens].float() @ gate_up_proj[expert].float().T).chunk(2, -1)
        hidden = (silu(g) if activation == "silu" else gelu(g, approximate="tanh")) * u
        out[tokens] += weight * (hidden @ down_proj[expert].float().T)
    return out.to(hidden_states.dtype)


# What it promises; each line is optional, and what is promised is judged.
experts.rounds = ()  # intermediate values stored in the input dtype: "gate_up", "activation", "expert_output", ...
experts.deterministic = True

# ---- Weights in another layout?  Judge your kernel through an adapter.
#
# def experts_ehi(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, **options):
#     """For a kernel that takes [E, H, 2 * I] and [E, I, H]: the same memory, seen with other strides."""
#     weights = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
#     return your_kernel_ehi(hidden_states, *weights, topk_weights, topk_ids, **options)
#
#
# def experts_interleaved(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, **options):
#     """For a kernel whose gate and up rows alternate: g0, u0, g1, u1, ..."""
#     alternating = gate_up_proj.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
#     return your_kernel_interleaved(hidden_states, alternating, down_proj, topk_weights, topk_ids, **options)
