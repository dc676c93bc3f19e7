"""The next token of each row: argmax, or a draw from the softmax cut to top_k, then to top_p.

The draw has Gumbel's form: the kept token with the largest logit / temperature + g wins, g = -log(-log u) from a
random number u that belongs to (seed, position, token) alone.  So a row's token depends on nothing else, and whoever
has the same random numbers (the Triton kernel has) draws the same token.
"""

import torch
from torch import Tensor

from moe_harness.impls.torch.cut import Whole, kept

__all__ = ["sampler"]

WORD = 0xFFFF_FFFF


def sampler(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, seeds: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """The stage `sampler`: logits [B, V], everything else [B] -> int64 [B].

    A top_k below 1 and a top_p of 1 and more cut nothing; at least the likeliest token is always kept.  Of tokens with
    equal logits at the edge of a cut the first ones are kept.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check(logits, temperature, top_k, top_p, seeds, positions)
    greedy = logits.argmax(1) if len(logits) else seeds.new_zeros(0, dtype=torch.int64)
    warm = temperature > 0
    if not warm.any():
        return greedy
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = (wide - wide.amax(1, keepdim=True)) * inverse_of(temperature, wide.dtype)[:, None]
    noisy = scores + gumbel(seeds, positions, logits.shape[1])
    if top_k is not None or top_p is not None:
        noisy = noisy.masked_fill(~kept(scores, top_k, top_p, logits.shape[1], Whole()), -torch.inf)
    return torch.where(warm, noisy.argmax(1), greedy)


sampler.rounds = ()
sampler.deterministic = True
sampler.batch_invariant = True


def best_in_shard(
    logits: Tensor, *, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidate of one shard of the vocabulary: logits [B, V'] of the tokens from `first`, a multiple of 4.

    Returns:
        tops, scores, tokens [B]: the shard's largest logit, the best (logit - top) / temperature + g, and its token.
        With the same noise as `sampler`, the best score over all shards, relative to one top, is the sampler's token.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tops = wide.amax(1, keepdim=True)
    warm = temperature > 0
    scores = torch.where(tops > -torch.inf, wide - tops, -torch.inf) * inverse_of(temperature, wide.dtype)[:, None]
    if logits.is_cuda or bool(warm.any()):  # a graph holds both; elsewhere greedy rows need no noise
        noise = gumbel(seeds, positions, logits.shape[1], first)
        scores = torch.where(warm[:, None], scores + noise, scores)
    best, at = scores.max(1)
    return tops[:, 0], best, at + first


def inverse_of(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """What logits are multiplied by, [B]; 1 in greedy rows."""
    return (1 / torch.where(temperature > 0, temperature.to(dtype), 1)).clamp(max=3e38)


def gumbel(seeds: Tensor, positions: Tensor, count: int, first: int = 0) -> Tensor:
    """Standard Gumbel variates of tokens first to first + count - 1 for each (seed, position), fp32 [B, count].

    v is uniform on 2^32 values and E = -log(1 - v) exponential.  Small E decide draws, so that they are taken from the
    series of the logarithm, where 1 - v would have lost digits of v.
    """
    v = (random_bits(seeds, positions, count, first).float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    exponential = torch.where(v < 2.0**-8, v * (1 + v * (0.5 + v * (1 / 3))), -torch.log(1 - v))
    return -torch.log(exponential)


def random_bits(seeds: Tensor, positions: Tensor, count: int, first: int = 0) -> Tensor:
    """32 random bits for each (seed, position, token), int64 [B, count]: Philox4x32-10 (Salmon et al., SC 2011).

    Token i has word i % 4 of the block with the counter (i // 4, position, 0, 0) and the key (seed's low, high word).
    Tokens start with `first`, a multiple of 4.
    """
    blocks = torch.arange(first // 4, first // 4 + -(-count // 4), device=seeds.device)
    seeds, positions = seeds.long()[:, None], positions.long()[:, None]
    zero = torch.zeros(len(seeds), len(blocks), dtype=torch.int64, device=seeds.device)
    a, b, c, d = blocks + zero, (positions & WORD) + zero, zero, zero
    low, high = seeds & WORD, (seeds >> 32) & WORD
    for _ in range(10):
        one, two = a * 0xD2511F53, c * 0xCD9E8D57  # int64 wraps, which leaves the 64 bits of the product right
        a, b, c, d = (two >> 32) & WORD ^ b ^ low, two & WORD, (one >> 32) & WORD ^ d ^ high, one & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return torch.stack([a, b, c, d], dim=2).flatten(1)[:, :count]


def check(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, seeds: Tensor, positions: Tensor
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: which ones, and what they should be.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits are {tuple(logits.shape)}, but should be [B, V] with V of at least 1")
    of_rows = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seeds": seeds, "positions": positions,
    }  # fmt: skip
    for name, tensor in of_rows.items():
        if tensor is not None and tuple(tensor.shape) != (len(logits),):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but should be {(len(logits),)}, one for each row of logits"
            )
