"""The stage `sampler` in Triton: the next token of each row.

- temperature 0: the argmax (any one of equal logits).  Otherwise a draw from softmax(logits / temperature), cut to the
  top_k likeliest tokens, then to the smallest set whose probability reaches top_p; a top_k of 0 and a top_p of 1 cut
  nothing.
- A row's token depends on its logits, its seed and its position alone: not on the batch, nor on another call.
- What is judged is the distribution, by counting draws; any source of random numbers serves.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage sampler --impl FILE:sampler --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage sampler --impl FILE:sampler   (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens in a tile


@triton.jit
def _draw(ordered, top_k, top_p, temperature, seeds, positions, chosen, V, TILE: tl.constexpr):
    """One row, its logits in descending order: which of them is drawn.  fp64: a sum over the vocabulary is compared."""
    row = tl.program_id(0).to(tl.int64)
    degrees = tl.load(temperature + row)
    heat = tl.where(degrees > 0, degrees, 1.0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    u = tl.rand(tl.load(seeds + row), tl.load(positions + row)).to(tl.float64)  # its seed's number at its position
    kept = tl.where(k > 0, tl.minimum(k, V), V)
    highest = tl.load(ordered + row * V).to(tl.float64)
    total, reached = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for start in range(0, V, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(ordered + row * V + at, mask=at < kept, other=-float("inf")).to(tl.float64)
        total += tl.sum(tl.exp((x - highest) / heat), 0)
    # A token stays while the probability before it is below top_p; the first one always does.
    nucleus = tl.zeros((), tl.float64)
    for start in range(0, V, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(ordered + row * V + at, mask=at < kept, other=-float("inf")).to(tl.float64)
        power = tl.exp((x - highest) / heat)
        before = reached + tl.cumsum(power, 0) - power
        nucleus += tl.sum(tl.where((before < p * total) | (at == 0), power, 0.0), 0)
        reached += tl.sum(power, 0)
    # The drawn one is the first whose sum with those before it exceeds u of the nucleus.
    passed, reached = tl.zeros((), tl.int64), tl.zeros((), tl.float64)
    for start in range(0, V, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(ordered + row * V + at, mask=at < kept, other=-float("inf")).to(tl.float64)
        power = tl.exp((x - highest) / heat)
        upto = reached + tl.cumsum(power, 0)
        passed += tl.sum(((upto <= u * nucleus) & (at < kept)).to(tl.int64), 0)
        reached += tl.sum(power, 0)
    tl.store(chosen + row, tl.where(degrees > 0, tl.minimum(passed, kept - 1), 0))


def sampler(
    logits: Tensor,  # [B, V]
    *,
    temperature: Tensor,  # [B]
    top_k: Tensor | None = None,  # int [B]
    top_p: Tensor | None = None,  # [B]
    seeds: Tensor,  # int [B]
    positions: Tensor,  # int [B]
) -> Tensor:  # int [B]
    B, V = logits.shape
    chosen = torch.zeros(B, dtype=torch.int64, device=logits.device)
    # To be replaced by a search for the two cuts; only they need the order.
    ordered, order = logits.float().sort(descending=True, stable=True)
    k = torch.zeros_like(chosen) if top_k is None else top_k.long()
    p = torch.ones(B, dtype=torch.float64, device=logits.device) if top_p is None else top_p.double()
    p = p.masked_fill(p >= 1, 2.0)  # cuts nothing: the probability before a token may round to 1
    if B:
        _draw[B,](ordered.contiguous(), k.contiguous(), p.contiguous(), temperature.double().contiguous(),
                  seeds.long().contiguous(), positions.int().contiguous(), chosen, V, BLOCK)  # fmt: skip
    return order.gather(1, chosen[:, None])[:, 0]


# What it promises; optional, and what is promised is judged.
sampler.deterministic = True
sampler.batch_invariant = True
