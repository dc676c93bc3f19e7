r"""A token over shards of the vocabulary in two launches: a rank's candidates as words to be gathered, and the best.

    words = [plan, top of each row, score of each row, token of each row]         int64 [1 + 3B], numbers as fp64 bits
    token[b] = the token with the largest score + (top - largest top of all shards) / temperature

The same candidates and the same choice as `best_in_shard` and `Ranks.winner`, which take some forty launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.triton._common import on
from moe_harness.impls.triton.sampler import _check, _drawn

__all__: list[str] = []  # no stage


@triton.jit
def _pack(temperature, tops, scores, tokens, plan, words, B, first, t_stride, PARTS: tl.constexpr, BP: tl.constexpr):
    """The best part of row program_id(0), as words."""
    b, part = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    degrees = tl.load(temperature + b * t_stride).to(tl.float32)
    inverse = tl.minimum(tl.div_rn(1.0, tl.where(degrees > 0, degrees, 1.0)), 3e38)
    top = tl.load(tops + b * PARTS + part, mask=part < PARTS, other=float("-inf"))
    score = tl.load(scores + b * PARTS + part, mask=part < PARTS, other=float("-inf"))
    largest = tl.max(top)
    score = tl.where(top > float("-inf"), score + (top - largest) * inverse, float("-inf"))
    token = tl.load(tokens + b * PARTS + tl.argmax(score, 0)).to(tl.int64) + first
    tl.store(words + 1 + b, largest.to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(words + 1 + B + b, tl.max(score).to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(words + 1 + 2 * B + b, token)
    if b == 0:
        tl.store(words, tl.load(plan))


@triton.jit
def _pick(words, temperature, out, B, t_stride, disagree, RANKS: tl.constexpr, BR: tl.constexpr):
    """The best candidate of row program_id(0); disagree - r where rank r is the first with another plan than rank 0."""
    b, rank = tl.program_id(0).to(tl.int64), tl.arange(0, BR)
    real = rank < RANKS
    own = words + rank.to(tl.int64) * (1 + 3 * B)
    degrees = tl.load(temperature + b * t_stride).to(tl.float64)
    inverse = tl.minimum(1.0 / tl.where(degrees > 0, degrees, 1.0), 3e38)
    top = tl.load(own + 1 + b, mask=real, other=0).to(tl.float64, bitcast=True)
    score = tl.load(own + 1 + B + b, mask=real, other=0).to(tl.float64, bitcast=True)
    real_top = real & (top > float("-inf"))
    largest = tl.max(tl.where(real, top, float("-inf")))
    relative = tl.where(real_top, score + (top - largest) * inverse, float("-inf"))
    token = tl.load(words + tl.argmax(relative, 0) * (1 + 3 * B) + 1 + 2 * B + b)
    plan = tl.load(own, mask=real, other=0)
    other = tl.min(tl.where(real & (plan != tl.load(words)), rank, RANKS))
    tl.store(out + b, tl.where(other < RANKS, disagree - other, token))


def shard_words(
    logits: Tensor, *, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int, plan: Tensor
) -> Tensor:
    """The candidates of one shard of the vocabulary: logits [B, V'] of the tokens from `first`, a multiple of 4.

    Args:
        temperature, seeds, positions: [B], as of `sampler`.
        plan: int64 [1], what every rank has to have alike.

    Returns:
        int64 [1 + 3B].

    Raises:
        ValueError, TypeError, NotImplementedError: as `sampler`; ValueError without a row.
    """
    _check(logits, temperature, None, None, seeds, positions)
    batch = len(logits)
    if not batch:
        raise ValueError("logits hold no row, but should hold one")
    words = torch.empty(1 + 3 * batch, dtype=torch.int64, device=logits.device)
    with on(logits.device):
        tops, scores, tokens = _drawn(logits, temperature, seeds, positions, words, words, cut=False, first=first)
        parts = tops.shape[1]
        _pack[(batch,)](
            temperature, tops, scores, tokens, plan, words, batch, first, temperature.stride(0), PARTS=parts,
            BP=triton.next_power_of_2(parts), num_warps=1,
        )  # fmt: skip
    return words


def pick(words: Tensor, temperature: Tensor, ranks: int, disagree: int) -> Tensor:
    """The token [B] with the best score over all shards.

    Args:
        words: those of all ranks, in their order.
        disagree: what stands in the place of tokens, less the number of the first rank with another plan than rank 0.
    """
    batch = len(temperature)
    out = torch.empty(batch, dtype=torch.int64, device=words.device)
    with on(words.device):
        _pick[(batch,)](
            words, temperature, out, batch, temperature.stride(0), disagree, RANKS=ranks,
            BR=triton.next_power_of_2(ranks), num_warps=1,
        )  # fmt: skip
    return out


shard_words.graph_capturable = pick.graph_capturable = True
