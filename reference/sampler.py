r"""The next token: the likeliest, or a draw from the softmax cut to its likeliest tokens.

    p = softmax(logits / temperature)
    p cut to the top_k likeliest tokens, then to the smallest set of the likeliest among them whose share of what the
    first cut left reaches top_p (nucleus sampling, https://arxiv.org/abs/1904.09751), and normalised again

At temperature 0 the likeliest token is taken.  A top_k below 1 or from V on cuts nothing, nor does a top_p from 1 on.
"""

import torch
from torch import Tensor


def probabilities(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """What a token is drawn from, [B, V] in the dtype of the logits: pass fp64 for an oracle.

    Of tokens with equal logits at the edge of a cut, the first ones are kept; any choice among them is right.
    """
    width = logits.shape[1]
    warm = temperature > 0
    scaled = logits / torch.where(warm, temperature, 1).to(logits.dtype)[:, None]
    sorted_logits, order = scaled.sort(dim=1, descending=True, stable=True)
    p = sorted_logits.softmax(1)
    rank = torch.arange(width, device=logits.device)
    if top_k is not None:
        limit = torch.where(top_k < 1, width, top_k)[:, None]
        p = p.masked_fill(rank >= limit, 0)
        p = p / p.sum(1, keepdim=True)
    if top_p is not None:
        before = p.cumsum(1) - p
        cut = (before >= top_p.to(p.dtype)[:, None]) & (top_p < 1)[:, None] & (rank > 0)
        p = p.masked_fill(cut, 0)
        p = p / p.sum(1, keepdim=True)
    greedy = (rank == 0).to(p.dtype).expand_as(p)
    return torch.zeros_like(p).scatter(1, order, torch.where(warm[:, None], p, greedy))


def sampler(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, seeds: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """Draw one token for each row.

    Args:
        logits: [B, V].
        temperature: [B], 0 for the likeliest token.
        top_k: int [B]; top_p: [B].
        seeds, positions: int [B].  A draw depends on the row, its seed and its position alone; how is free.

    Returns:
        int64 [B].
    """
    p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = []
    for row, seed, position in zip(p, seeds.tolist(), positions.tolist(), strict=True):
        generator = torch.Generator(row.device).manual_seed((seed * 1_000_003 + position) % 2**63)
        tokens.append(torch.multinomial(row, 1, generator=generator))
    return torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64, device=logits.device)
