"""The stage `experts` in Triton: the routed experts of a Mixture-of-Experts layer.

out[t] = sum over j of topk_weights[t, j] * down_proj[e] @ (act(g) * u),  e = topk_ids[t, j]
         [g; u] = gate_up_proj[e] @ hidden_states[t], g its first I rows

- expert_map: int [E_global]; topk_ids are global then and e = expert_map[id].
- An id of -1, or one mapped to -1, contributes nothing, whatever its weight (NaN too).  A repeated id counts twice.
- activation: "silu" or "gelu_tanh".  Any strides; T = 0, k = E and experts without tokens are ordinary inputs.
- The output is a new tensor in the dtype of hidden_states; no input is modified.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage experts --impl FILE:experts --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage experts --impl FILE:experts        (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu, silu

BLOCK_M, BLOCK_N, BLOCK_K = 16, 32, 32


@triton.jit
def _grouped(
    x, row_of, weight, out, tile_expert, tile_start, expert_end, N, K,
    x_s, x_k, w_e, w_n, w_k,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """out[s] = weight[e] @ x[row_of[s]] for a tile of rows s of one expert; fp32."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, M_TILE)
    here = rows < tl.load(expert_end + expert)
    source = tl.load(row_of + rows, mask=here, other=0).to(tl.int64)
    columns = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    total = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, K, K_TILE):
        depth = start + tl.arange(0, K_TILE)
        a_mask, b_mask = here[:, None] & (depth < K)[None, :], (depth < K)[:, None] & (columns < N)[None, :]
        a = tl.load(x + source[:, None] * x_s + depth[None, :] * x_k, mask=a_mask, other=0.0)
        b = tl.load(weight + expert * w_e + columns.to(tl.int64)[None, :] * w_n + depth[:, None] * w_k, b_mask, 0.0)
        # To be replaced by a product of the 16-bit tiles themselves; the interpreter gets those wrong for bf16.
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, total, mask=here[:, None] & (columns < N)[None, :])


def grouped(x: Tensor, row_of: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows sorted by expert, counts[e] of each: row s is weight[e] @ x[row_of[s]], [S, N] in fp32."""
    E, N, K = weight.shape
    out = torch.empty(len(row_of), N, dtype=torch.float32, device=x.device)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends, number = counts.cumsum(0), int(tiles.sum())
    if number == 0 or N == 0:
        return out
    expert = torch.repeat_interleave(torch.arange(E, device=x.device), tiles)
    place = torch.arange(number, device=x.device) - (tiles.cumsum(0) - tiles)[expert]
    start = (ends - counts)[expert] + place * BLOCK_M
    _grouped[number, triton.cdiv(N, BLOCK_N)](
        x, row_of, weight, out, expert, start, ends, N, K, *x.stride(), *weight.stride(), BLOCK_M, BLOCK_N, BLOCK_K
    )
    return out


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
    k, experts_here = topk_ids.shape[1], len(gate_up_proj)
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    ids = ids.flatten()
    slots = ids.argsort(stable=True)[int((ids < 0).sum()) :]  # of this rank's experts, sorted by expert
    counts = torch.bincount(ids[slots], minlength=experts_here)
    g, u = grouped(hidden_states, slots // max(k, 1), gate_up_proj, counts).chunk(2, -1)
    hidden = ((silu(g) if activation == "silu" else gelu(g, approximate="tanh")) * u).to(hidden_states.dtype)
    rows = grouped(hidden, torch.arange(len(slots), device=ids.device), down_proj, counts)
    weighted = torch.zeros(len(ids), hidden_states.shape[1], dtype=torch.float32, device=ids.device)
    weighted[slots] = rows * topk_weights.flatten()[slots, None].float()
    return weighted.unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype) if k else torch.zeros_like(hidden_states)


# What it promises; each line is optional, and what is promised is judged.
experts.rounds = ("activation",)  # intermediate values stored in the input dtype
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
