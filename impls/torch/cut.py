"""Which tokens top_k and top_p keep of rows whose vocabulary may lie in shards, without bringing a row together.

A token's depth is the bits of |score| as an integer: scores are at most 0, so the likelier a token the smaller its
depth.  The edge of a cut is found digit by digit from counts (top_k) and masses (top_p) of what lies within a depth,
summed over the shards.  Masses are probabilities as integers, so that their sums are the same in any order: ranks keep
the very tokens that one rank keeps.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

DIGIT = 8  # bits of an edge that one sum over the shards settles
LAST = torch.iinfo(torch.int64).max  # the edge of a row that is not cut


class Shards(Protocol):
    """The shards of a vocabulary, this one among them, in the order of their tokens."""

    def total(self, numbers: Tensor) -> Tensor:
        """int64 [...], the sum over all shards."""
        ...

    def before(self, numbers: Tensor) -> Tensor:
        """int64 [...], the sum over the shards before this one."""
        ...


class Whole:
    """The vocabulary in one piece."""

    def total(self, numbers: Tensor) -> Tensor:
        return numbers

    def before(self, numbers: Tensor) -> Tensor:
        return torch.zeros_like(numbers)


def kept(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None, vocabulary: int, shards: Shards) -> Tensor:
    """bool [B, V'], the tokens of this shard that the cuts leave.  A collective of the shards.

    Args:
        scores: [B, V'], (logit - largest logit of the whole row) / temperature, fp32 or fp64.
        top_k: int [B], below 1 cuts nothing; top_p: [B], from 1 on cuts nothing.
        vocabulary: tokens of all shards.

    Of equal scores at the edge of a cut the first tokens are kept, and at least the likeliest always.
    """
    row = _Row(scores, vocabulary, shards)
    edge, allowed = torch.full_like(row.depths[:, 0], LAST), torch.zeros_like(row.depths[:, 0])
    if top_k is not None:
        edge, allowed = row.cut_by_count(top_k.long())
    if top_p is not None:
        edge, allowed = row.cut_by_mass(top_p.double(), edge, allowed)
    on_edge = row.depths == edge[:, None]
    order = on_edge.cumsum(1) + shards.before(on_edge.sum(1))[:, None]
    return (row.depths < edge[:, None]) | (on_edge & (order <= allowed[:, None]))


class _Row:
    """Rows of scores by depth.  An edge is a depth [B]; `allowed` [B] is how many tokens on it are kept."""

    def __init__(self, scores: Tensor, vocabulary: int, shards: Shards):
        self.vocabulary, self.shards, self.dtype = vocabulary, shards, scores.dtype
        self.bits = 63 if scores.dtype == torch.float64 else 31
        self.depths = scores.abs().view(torch.int64 if self.bits == 63 else torch.int32).long()
        self.ordered, order = self.depths.sort(1)
        masses = self._masses(scores).gather(1, order).cumsum(1)
        self.within = torch.cat((torch.zeros_like(masses[:, :1]), masses), 1)  # mass of the n likeliest tokens here

    def cut_by_count(self, top_k: Tensor) -> tuple[Tensor, Tensor]:
        cut = (top_k >= 1) & (top_k < self.vocabulary)
        edge = self._smallest(self._count, torch.where(cut, top_k, 1))
        above = self._count(edge[:, None] - 1)[:, 0]
        return torch.where(cut, edge, LAST), torch.where(cut, top_k - above, 0)

    def cut_by_mass(self, top_p: Tensor, edge: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The cut of what `edge` and `allowed` have left."""
        left = self._mass(edge[:, None] - 1)[:, 0] + torch.where(allowed > 0, allowed * self._mass_at(edge), 0)
        wanted = (top_p * left.double()).ceil().long().clamp(min=1)

        def mass(depths: Tensor) -> Tensor:
            return torch.where(depths >= edge[:, None], left[:, None], self._mass(depths))

        nucleus = torch.minimum(self._smallest(mass, torch.minimum(wanted, left)), edge)
        short = wanted - self._mass(nucleus[:, None] - 1)[:, 0]
        needed = (-(-short // self._mass_at(nucleus).clamp(min=1))).clamp(min=1)
        needed = torch.where(nucleus < edge, needed, torch.minimum(needed, allowed))
        cut = (top_p < 1) & (left > 0)  # nothing is known of a row of NaN
        return torch.where(cut, nucleus, edge), torch.where(cut, needed, allowed)

    def _smallest(self, reached: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
        """The smallest depth [B] within which `reached` is at least `wanted` [B]."""
        found = torch.zeros_like(wanted)
        for shift in range(self.bits // DIGIT * DIGIT, -1, -DIGIT):
            digits = torch.arange(min(1 << DIGIT, 1 << (63 - shift)), device=found.device)
            ends = found[:, None] + (digits << shift) + ((1 << shift) - 1)
            found = found + ((reached(ends) < wanted[:, None]).sum(1) << shift)
        return found

    def _count(self, depths: Tensor) -> Tensor:
        """How many tokens of all shards lie within these depths, [B, n]."""
        return self.shards.total(self._here(depths))

    def _mass(self, depths: Tensor) -> Tensor:
        """Their mass, [B, n]."""
        return self.shards.total(self.within.gather(1, self._here(depths)))

    def _here(self, depths: Tensor) -> Tensor:
        return torch.searchsorted(self.ordered, depths.contiguous(), right=True)

    def _mass_at(self, depth: Tensor) -> Tensor:
        """The mass of one token at this depth [B]."""
        bits = depth.clamp(max=(1 << self.bits) - 1)
        scores = bits.view(self.dtype) if self.bits == 63 else bits.int().view(self.dtype)
        return self._masses(-scores)

    def _masses(self, scores: Tensor) -> Tensor:
        """exp(score) in units in which those of a whole vocabulary stay below 2^62."""
        return (scores.exp().nan_to_num(0.0).double() * 2.0 ** (62 - self.vocabulary.bit_length())).long()
