"""The stage `quantized_experts` in Triton: as `experts`, with weights as they are shipped.

    first = W_gate_up[e] @ x_t + bias;  hidden = act(gate) * up;  out[t] = sum of weight * (W_down[e] @ hidden + bias)

Each matrix [N, K] (gate_up: 2I, H; down: H, I) stands for real numbers; this file reads

    fp8_block     float8_e4m3fn [E, N, K], scale fp32 [E, ceil(N/128), ceil(K/128)]: code * scale[n // 128, k // 128]
    fp8_channel   float8_e4m3fn [E, N, K], scale fp32 [E, N]: code * scale[n]
    int8_channel  int8 [E, N, K], scale fp32 [E, N]: code * scale[n]

- Other formats (plain, int4_group, mxfp4) are left out of `formats` below, and so not asked for.
- A slot with an id of -1, or one that expert_map sends to -1, adds nothing, whatever its weight holds.
- swiglu_oai: g = min(g, 7), u = clamp(u, -7, 7), hidden = (u + 1) * g * sigmoid(1.702 * g).
- Rows that are quantised on their way into a product are declared: quantized_experts.quantizes = "fp8_group128".
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage quantized_experts --impl FILE:quantized_experts --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage quantized_experts --impl FILE:quantized_experts   (without a GPU)
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 16, 64, 64
RUNS = {"fp8_block": (128, 128), "fp8_channel": (1, 2**30), "int8_channel": (1, 2**30)}  # n and k that share a scale


@triton.jit
def _grouped(
    x, row_of, codes, scale, bias, out, tile_expert, tile_start, expert_end, N, K, n_run, k_run,
    x_s, x_k, w_e, w_n, w_k, s_e, s_n, s_k, b_e, b_n, HAS_BIAS: tl.constexpr,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """out[s] = W[e] @ x[row_of[s]] + bias[e] for a tile of rows s of one expert; fp32."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    rows = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, M_TILE)
    here = rows < tl.load(expert_end + expert)
    source = tl.load(row_of + rows, mask=here, other=0).to(tl.int64)
    columns = (tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)).to(tl.int64)
    total = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, K, K_TILE):
        depth = start + tl.arange(0, K_TILE)
        a_mask, b_mask = here[:, None] & (depth < K)[None, :], (depth < K)[:, None] & (columns < N)[None, :]
        a = tl.load(x + source[:, None] * x_s + depth[None, :] * x_k, mask=a_mask, other=0.0).to(tl.float32)
        code = tl.load(codes + expert * w_e + columns[None, :] * w_n + depth[:, None] * w_k, mask=b_mask)
        at = scale + expert * s_e + columns[None, :] // n_run * s_n + depth[:, None] // k_run * s_k
        # To be replaced by a product of the codes, scaled once a run, where n and k are tiled along the runs.
        b = tl.where(b_mask, code.to(tl.float32) * tl.load(at, mask=b_mask, other=0.0), 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + expert * b_e + columns * b_n, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    to = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(to, total, mask=here[:, None] & (columns < N)[None, :])


def grouped(x: Tensor, row_of: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, counts: Tensor,
            runs: tuple[int, int]) -> Tensor:  # fmt: skip
    """Rows sorted by expert, counts[e] of each: row s is W[e] @ x[row_of[s]] + bias[e], [S, N] in fp32."""
    E, N, K = codes.shape
    out = torch.empty(len(row_of), N, dtype=torch.float32, device=x.device)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends, number = counts.cumsum(0), int(tiles.sum())
    if number == 0 or N == 0:
        return out
    expert = torch.repeat_interleave(torch.arange(E, device=x.device), tiles)
    place = torch.arange(number, device=x.device) - (tiles.cumsum(0) - tiles)[expert]
    start = (ends - counts)[expert] + place * BLOCK_M
    scale = scale if scale.dim() == 3 else scale[..., None]
    _grouped[number, triton.cdiv(N, BLOCK_N)](
        x, row_of, codes, scale, x if bias is None else bias, out, expert, start, ends, N, K, *runs, *x.stride(),
        *codes.stride(), *scale.stride(), *((0, 0) if bias is None else bias.stride()), bias is not None,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    return out


def gated(first: Tensor, activation: str) -> Tensor:
    gate, up = first.chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def quantized_experts(
    hidden_states: Tensor,  # [T, H]
    gate_up_proj: Tensor,  # codes of [E, 2I, H]
    gate_up_scale: Tensor | None,
    down_proj: Tensor,  # codes of [E, H, I]
    down_scale: Tensor | None,
    topk_weights: Tensor,  # [T, k]
    topk_ids: Tensor,  # int [T, k]
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,  # int [E], global to local ids
    gate_up_bias: Tensor | None = None,  # [E, 2I]
    down_bias: Tensor | None = None,  # [E, H]
) -> Tensor:  # [T, H]
    if format not in RUNS or gate_up_scale is None or down_scale is None:
        raise NotImplementedError(f"format {format}")
    k, ids = topk_ids.shape[1], topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    ids = ids.flatten()
    slots = ids.argsort(stable=True)[int((ids < 0).sum()) :]  # of this rank's experts, sorted by expert
    counts, runs = torch.bincount(ids[slots], minlength=len(gate_up_proj)), RUNS[format]
    first = grouped(hidden_states, slots // max(k, 1), gate_up_proj, gate_up_scale, gate_up_bias, counts, runs)
    each = torch.arange(len(slots), device=ids.device)
    rows = grouped(gated(first, activation), each, down_proj, down_scale, down_bias, counts, runs)
    weighted = torch.zeros(len(ids), hidden_states.shape[1], dtype=torch.float32, device=ids.device)
    weighted[slots] = rows * topk_weights.flatten()[slots, None].float()
    return weighted.unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype) if k else torch.zeros_like(hidden_states)


# What it promises; optional, and what is promised is judged.
quantized_experts.formats = tuple(RUNS)
quantized_experts.rounds = ()
quantized_experts.deterministic = True
