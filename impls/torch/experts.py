"""The routed experts: out[t] = sum over j of w[t, j] * down[e] @ (act(g) * u), [g; u] = gate_up[e] @ x[t].

hidden_states [T, H], gate_up_proj [E, 2I, H], down_proj [E, H, I], topk_weights and topk_ids [T, k] -> [T, H].
`loop` and `batched` compute in fp32 and round once, at the end; `grouped_mm` stores gate and up, the activation and
the expert's output in the dtype of hidden_states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.torch.grouped_linear import product

__all__ = ["loop", "grouped_mm", "batched"]

GATHERED_ELEMENTS = 2**24  # `batched` copies weights slot by slot: 64 MiB of fp32 at a time


def loop(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts`, expert after expert.

    A token that chose an expert twice is computed once, with the sum of both weights.  So the rows added to `out` are
    distinct, and the order of the additions is the order of the experts.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    ids = _local_ids(topk_ids, expert_map)
    out = torch.zeros(hidden_states.shape, dtype=wide, device=hidden_states.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        chosen = ids == expert
        tokens = chosen.any(1).nonzero().squeeze(1)
        # where, not a product: the weight of a slot that is not this expert's may be NaN.
        weight = torch.where(chosen, topk_weights.to(wide), 0).sum(1)
        rows = hidden_states[tokens].to(wide)
        hidden = _gated(rows @ gate_up_proj[expert].to(wide).T, activation)
        out[tokens] += weight[tokens, None] * (hidden @ down_proj[expert].to(wide).T)
    return out.to(hidden_states.dtype)


loop.rounds = ()
loop.deterministic = True


def grouped_mm(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts` with two grouped GEMMs over the slots sorted by expert.

    Masked slots are sorted behind the last group, where the GEMM leaves its output undefined, and dropped at the end.
    On CUDA the GEMM reads the group sizes on the host for fp32 and fp16, so only bf16 could be captured in a graph.

    Raises:
        NotImplementedError: fp64.
    """
    top_k, num_experts = topk_ids.shape[1], gate_up_proj.shape[0]
    ids = _local_ids(topk_ids, expert_map).reshape(-1)
    by_expert, order = torch.where(ids < 0, num_experts, ids).sort(stable=True)
    experts = torch.arange(num_experts, device=ids.device, dtype=by_expert.dtype)
    ends = torch.searchsorted(by_expert, experts, right=True)

    rows = hidden_states[order // max(top_k, 1)]
    gate_up = product(rows, gate_up_proj, ends)
    hidden = _gated(gate_up.float(), activation).to(hidden_states.dtype)
    output = product(hidden, down_proj, ends).float()

    weighted = output * topk_weights.reshape(-1)[order, None].float()
    weighted = torch.where((by_expert < num_experts)[:, None], weighted, 0)
    per_slot = torch.empty_like(weighted)
    per_slot[order] = weighted
    return per_slot.unflatten(0, topk_ids.shape).sum(1).to(hidden_states.dtype)


grouped_mm.rounds = ("gate_up", "activation", "expert_output")
grouped_mm.deterministic = True


def batched(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """The stage `experts` as one matrix-vector product per slot, on weights gathered for each slot.

    No shape depends on the routing.  A masked slot runs on expert 0, and its result is thrown away.
    """
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    ids = _local_ids(topk_ids, expert_map).reshape(-1)
    if gate_up_proj.shape[0] == 0 or len(ids) == 0:
        return torch.zeros(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    expert = ids.clamp(min=0)
    tokens = torch.arange(len(hidden_states), device=ids.device).repeat_interleave(topk_ids.shape[1])
    chunk = max(1, GATHERED_ELEMENTS // max(1, gate_up_proj[0].numel()))
    outputs = [
        _slots(hidden_states[t].to(wide), gate_up_proj[e].to(wide), down_proj[e].to(wide), activation)
        for t, e in zip(tokens.split(chunk), expert.split(chunk), strict=True)
    ]
    weighted = torch.cat(outputs) * topk_weights.reshape(-1, 1).to(wide)
    weighted = torch.where((ids >= 0)[:, None], weighted, 0)
    return weighted.unflatten(0, topk_ids.shape).sum(1).to(hidden_states.dtype)


batched.rounds = ()
batched.deterministic = True
batched.graph_capturable = True


def _slots(rows: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One expert per row: rows [n, H], gate_up [n, 2I, H], down [n, H, I] -> [n, H]."""
    hidden = _gated((gate_up @ rows.unsqueeze(2)).squeeze(2), activation)
    return (down @ hidden.unsqueeze(2)).squeeze(2)


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(g) * u of [..., 2I] -> [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    raise ValueError(f"activation is {activation!r}, but should be 'silu' or 'gelu_tanh'")


def _local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Ids into the given weights, -1 where the slot is masked or its expert lives elsewhere."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
