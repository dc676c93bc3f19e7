"""The stage `sampler`: the next token of each row.

- temperature 0: the argmax (any one of equal logits). Otherwise a draw from softmax(logits / temperature), cut to the
  top_k likeliest tokens, then to the smallest set whose probability reaches top_p; a top_k of 0 and a top_p of 1 cut
  nothing.
- A row's token depends on its logits, its seed and its position alone: not on the batch, nor on another call.
- What is judged is the distribution, by counting draws; any source of random numbers serves.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage sampler --impl FILE:sampler
"""

import torch
from torch import Tensor


def sampler(
    logits: Tensor,  # [B, V]
    *,
    temperature: Tensor,  # [B]
    top_k: Tensor | None = None,  # int [B]
    top_p: Tensor | None = None,  # [B]
    seeds: Tensor,  # int [B]
    positions: Tensor,  # int [B]
) -> Tensor:  # int [B]
    tokens = logits.argmax(1) if len(logits) else seeds.new_zeros(0)
    for row in (temperature > 0).nonzero().flatten().tolist():
        scores = logits[row].double() / temperature[row].double()
        ordered, order = scores.sort(descending=True, stable=True)
        chances = ordered.softmax(0)
        if top_k is not None and top_k[row] > 0:
            chances[int(top_k[row]) :] = 0
        if top_p is not None and top_p[row] < 1:
            before = chances.cumsum(0) - chances
            chances[1:][before[1:] >= top_p[row].double() * chances.sum()] = 0
        generator = torch.Generator().manual_seed((int(seeds[row]) * 1_000_003 + int(positions[row])) % 2**63)
        tokens[row] = order[torch.multinomial(chances.cpu(), 1, generator=generator).to(order.device)][0]
    return tokens


# What it promises; optional, and what is promised is judged.
sampler.deterministic = True
sampler.batch_invariant = True
