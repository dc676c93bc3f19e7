"""The stage `moe_block`, products in Triton: a whole sparse block, from the hidden states to their sum over experts.

    weights  the checkpoint's names without the layer prefix: gate.weight [E, H], experts.gate_up_proj [E, 2 * I, H],
             experts.down_proj [E, H, I]; shared_expert.{gate,up,down}_proj.weight and shared_expert_gate.weight where
             the family has them
    config   Hugging Face's keys: model_type, num_experts_per_tok, norm_topk_prob, hidden_act, ...

- The output is a new tensor in the dtype of hidden_states; no input is modified; T = 0 is ordinary.
- Families you do not serve: raise NotImplementedError, and the case is listed as unsupported.
- One kernel does every product here, a dense layer being one expert that has all rows; `moe-harness init router -l
  triton` and `init experts -l triton` have the parts by themselves.

    moe-harness check --stage moe_block --impl FILE:moe_block --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage moe_block --impl FILE:moe_block   (without a GPU, slowly)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu, silu

BLOCK_M, BLOCK_N, BLOCK_K = 16, 32, 32
RENORMALIZED = {"mixtral": True, "qwen3_moe": None, "qwen2_moe": None}  # None: as norm_topk_prob says
ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": lambda g: gelu(g, approximate="tanh")}


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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp32."""
    each = torch.arange(len(x), device=x.device)
    return grouped(x, each, weight[None], torch.full((1,), len(x), device=x.device))


def moe_block(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Tensor:  # [T, H] -> [T, H]
    family, activation = config.get("model_type"), config.get("hidden_act", "silu")
    if family not in RENORMALIZED or activation not in ACTIVATIONS:
        raise NotImplementedError(f"model_type {family!r}, hidden_act {activation!r}")
    act, x = ACTIVATIONS[activation], hidden_states

    # The router's linear layer and its weights are held in the input dtype by these families, Mixtral's weights apart.
    logits = linear(x, weights["gate.weight"]).to(x.dtype).float()
    top, ids = logits.softmax(-1).topk(config["num_experts_per_tok"], -1)
    renormalize = RENORMALIZED[family]
    if config.get("norm_topk_prob", False) if renormalize is None else renormalize:
        top = top / top.sum(-1, keepdim=True)
    if family != "mixtral":
        top = top.to(x.dtype).float()

    slots = ids.flatten().argsort(stable=True)  # sorted by expert
    counts = torch.bincount(ids.flatten(), minlength=logits.shape[1])
    g, u = grouped(x, slots // ids.shape[1], weights["experts.gate_up_proj"], counts).chunk(2, -1)
    each = torch.arange(len(slots), device=x.device)
    rows = torch.empty(len(slots), x.shape[1], dtype=torch.float32, device=x.device)
    rows[slots] = grouped(act(g) * u, each, weights["experts.down_proj"], counts)
    out = (rows.view(*ids.shape, x.shape[1]) * top[..., None]).sum(1)
    if "shared_expert.down_proj.weight" in weights:
        gate, up, down = (weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
        shared = linear(act(linear(x, gate)) * linear(x, up), down)
        out += linear(x, weights["shared_expert_gate.weight"]).sigmoid() * shared
    return out.to(x.dtype)


# What it promises; optional, and what is promised is judged.
moe_block.rounds = ("routing_weight",)  # intermediate values stored in the input dtype
moe_block.deterministic = True
