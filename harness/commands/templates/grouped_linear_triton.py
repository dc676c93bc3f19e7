"""The stage `grouped_linear` in Triton: a linear layer with one weight per expert.

Rows are sorted by expert: the first group_sizes[0] rows belong to expert 0, and so on; they sum to S.

    out[s] = weight[e] @ x[s] + bias[e]

- Zero-sized groups and S = 0 are ordinary; any strides; the products accumulate in at least fp32.
- The output is a new tensor in the dtype of x; no input is modified.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage grouped_linear --impl FILE:grouped_linear --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage grouped_linear --impl FILE:grouped_linear   (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 16, 32, 32


@triton.jit
def _grouped(
    x, weight, bias, out, tile_expert, tile_start, expert_end, N, K,
    x_s, x_k, w_e, w_n, w_k, b_e, b_n, HAS_BIAS: tl.constexpr,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    rows = tl.load(tile_start + tl.program_id(0)).to(tl.int64) + tl.arange(0, M_TILE)
    here = rows < tl.load(expert_end + expert)
    columns = (tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)).to(tl.int64)
    total = tl.zeros((M_TILE, N_TILE), tl.float32)
    for start in range(0, K, K_TILE):
        depth = start + tl.arange(0, K_TILE)
        a_mask, b_mask = here[:, None] & (depth < K)[None, :], (depth < K)[:, None] & (columns < N)[None, :]
        a = tl.load(x + rows[:, None] * x_s + depth[None, :] * x_k, mask=a_mask, other=0.0)
        b = tl.load(weight + expert * w_e + columns[None, :] * w_n + depth[:, None] * w_k, mask=b_mask, other=0.0)
        # To be replaced by a product of the 16-bit tiles themselves; the interpreter gets those wrong for bf16.
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + expert * b_e + columns * b_n, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None] * N + columns[None, :]
    tl.store(at, total, mask=here[:, None] & (columns < N)[None, :])


def grouped_linear(
    x: Tensor,  # [S, K]
    weight: Tensor,  # [E, N, K]
    group_sizes: Tensor,  # int [E]
    *,
    bias: Tensor | None = None,  # [E, N]
) -> Tensor:  # [S, N]
    E, N, K = weight.shape
    out = torch.empty(len(x), N, dtype=torch.float32, device=x.device)
    counts = group_sizes.long()
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends, number = counts.cumsum(0), int(tiles.sum())
    if number == 0 or N == 0:
        return out.to(x.dtype)
    expert = torch.repeat_interleave(torch.arange(E, device=x.device), tiles)
    place = torch.arange(number, device=x.device) - (tiles.cumsum(0) - tiles)[expert]
    start = (ends - counts)[expert] + place * BLOCK_M
    _grouped[number, triton.cdiv(N, BLOCK_N)](
        x, weight, x if bias is None else bias, out, expert, start, ends, N, K,
        *x.stride(), *weight.stride(), *((0, 0) if bias is None else bias.stride()), bias is not None,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    return out.to(x.dtype)  # to be stored so by the kernel; the interpreter cuts bf16 off instead of rounding


# What it promises; optional, and what is promised is judged.
grouped_linear.deterministic = True
