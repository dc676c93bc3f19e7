"""Faults of redundant experts: several physical experts hold one logical expert, each slot goes to one of them.

A right dispatcher with copies is the one of `_bases` over physical experts, behind the choice of a copy.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked
from moe_harness.harness.stages.dispatcher.faults._bases import Copies, Gathered, Rows

SHOWS = "R=2,E=4,k=2,T=4+3,copies=4,owner=cyclic"
HIDDEN = ("R=2,E=4,k=2,T=4+3",)


class Replicated(Copies):
    """Tokens take the copies of their experts in turn."""

    supports_copies = True

    def __init__(self, group: Any, *, num_experts: int, owner: Tensor, logical: Tensor | None = None):
        super().__init__(group, num_experts=len(owner), owner=owner)
        self.logical = torch.arange(len(owner)) if logical is None else logical.long()
        self.held = [(self.logical == expert).nonzero().flatten().tolist() for expert in range(num_experts)]

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        return super().dispatch(x, weights, self.physical(ids))

    def physical(self, ids: Tensor) -> Tensor:
        """The physical expert of each slot."""
        chosen = [
            [-1 if expert < 0 else self.choose(self.held[expert], token) for expert in row]
            for token, row in enumerate(ids.tolist())
        ]
        return torch.tensor(chosen, dtype=torch.int64).reshape(ids.shape)

    def choose(self, copies: list[int], token: int) -> int:
        return copies[token % len(copies)]


@ranked("EPLB", condition="copies", shows=SHOWS, hidden=HIDDEN)
class logical_id_as_physical(Replicated):
    """The id of a logical expert is used as that of a physical one: after a rebalancing another expert answers."""

    def physical(self, ids: Tensor) -> Tensor:
        return ids.long()


@ranked("EPLB", condition="an expert with two copies", shows=SHOWS, hidden=HIDDEN)
class every_copy_runs(Replicated):
    """A slot goes to all copies of its expert, and each result counts."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        most = max(map(len, self.held), default=1)
        per_turn = [
            [[-1 if e < 0 or turn >= len(self.held[e]) else self.held[e][turn] for e in row] for row in ids.tolist()]
            for turn in range(most)
        ]
        spread = torch.tensor(per_turn, dtype=torch.int64).reshape(most, *ids.shape)
        return super(Replicated, self).dispatch(x, weights.repeat(1, most), torch.cat(list(spread), 1))


@ranked(
    "EPLB", condition="copies, local ids by the order of logical experts", shows=SHOWS, hidden=HIDDEN,
)  # fmt: skip
class local_ids_by_logical_order(Replicated):
    """A rank's experts are counted in the order of what they hold instead of their physical number."""

    def __init__(self, group: Any, **keywords: Any):
        super().__init__(group, **keywords)
        for rank in range(self.ranks):
            mine = (self.owner == rank).nonzero().flatten()
            order = mine[self.logical[mine].argsort(stable=True)]
            self.place[order] = torch.arange(len(order))


@ranked("EPLB", condition="a copy on another rank", shows=SHOWS, hidden=HIDDEN)
class only_own_copies(Replicated):
    """Where a rank holds no copy of an expert itself, its slots are dropped as if the expert were masked."""

    def physical(self, ids: Tensor) -> Tensor:
        chosen = super().physical(ids)
        held = torch.tensor([len(self.held[int(e)]) for e in self.logical]) > 1
        foreign = (chosen >= 0) & held[chosen.clamp(min=0)] & (self.owners(chosen) != self.rank)
        return chosen.masked_fill(foreign, -1)


@ranked(
    "EPLB", condition="ranks choose copies for themselves in a scheme that gathers",
    shows=SHOWS, hidden=HIDDEN,
)  # fmt: skip
class ranks_choose_apart(Gathered):
    """Every rank chooses the copies of all tokens by its own count: a slot is run by nobody, or by two."""

    supports_copies = True

    def __init__(self, group: Any, *, num_experts: int, owner: Tensor, logical: Tensor | None = None):
        super().__init__(group, num_experts=len(owner), owner=owner)
        self.logical = torch.arange(len(owner)) if logical is None else logical.long()
        self.held = [(self.logical == expert).nonzero().flatten().tolist() for expert in range(num_experts)]

    def mine(self, ids: Tensor) -> Tensor:
        chosen = [
            [-1 if e < 0 else self.held[e][(token + self.rank) % len(self.held[e])] for e in row]
            for token, row in enumerate(ids.tolist())
        ]
        return super().mine(torch.tensor(chosen, dtype=torch.int64).reshape(ids.shape))


@ranked("EP", condition="more than one group of ranks", shows="R=4,E=4,k=2,T=3+2,groups=2",
        hidden=("R=4,E=4,k=2,T=3+2+1+0", "R=2,E=4,k=2,T=3+2"))  # fmt: skip
class summed_over_the_world(Gathered):
    """The sum goes over all ranks instead of over the group: the other axis' shares are added."""

    def reduce(self, out: Tensor) -> Tensor:
        dist.all_reduce(out)
        return out


@ranked("EP", source="tenstorrent/tt-metal/issues/57357", condition="more than one rank", shows="R=2,E=4,k=2,T=3+3",
        hidden=("R=1,E=4,k=2,T=3",))  # fmt: skip
class half_a_ring(Gathered):
    """Rows reach half of the ranks each way round, which on a line leaves out the far ones: they see none of them."""

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        blocks = list(super().gather(own, counts).split(counts))
        for source, block in enumerate(blocks):
            ahead = self.rank - source
            if ahead > self.ranks // 2 or -ahead > (self.ranks - 1) // 2:
                block.fill_(0 if block.is_floating_point() else -1)
        return torch.cat(blocks)
