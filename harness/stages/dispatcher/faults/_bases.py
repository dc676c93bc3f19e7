"""Right dispatchers in small replaceable steps, which the faults are made from."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Rows:
    """What dispatch returns; `memory` is what combine needs."""

    def __init__(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, **memory: Any):
        self.hidden_states, self.topk_weights, self.topk_ids = hidden_states, topk_weights, topk_ids
        self.memory = memory


class Base:
    """Ownership: `owners` and `local` turn global ids into ranks and local ids."""

    def __init__(self, group: Any, *, num_experts: int, owner: Tensor):
        self.group, self.num_experts, self.owner = group, num_experts, owner.long()
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        places = [(owner[:e] == owner[e]).sum() for e in range(num_experts)]
        self.place = torch.stack(places) if places else owner.long()

    def owners(self, ids: Tensor) -> Tensor:
        """Rank of each slot's expert, -1 for a masked slot."""
        return torch.where(ids < 0, -1, self.owner[ids.clamp(min=0)])

    def local(self, ids: Tensor) -> Tensor:
        """Local id of each slot's expert at its owner, -1 for a masked slot."""
        return torch.where(ids < 0, -1, self.place[ids.clamp(min=0)])

    def mine(self, ids: Tensor) -> Tensor:
        """Local ids on this rank, -1 for all other slots."""
        return torch.where(self.owners(ids) == self.rank, self.local(ids), -1)

    def counts(self, own: int) -> list[int]:
        """Tokens of every rank."""
        out = torch.zeros(self.ranks, dtype=torch.int64)
        dist.all_to_all_single(out, torch.full((self.ranks,), own), group=self.group)
        return out.tolist()


class Gathered(Base):
    """All rows everywhere, all_reduce, own slice."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        counts = self.counts(len(x))
        x, weights, ids = (self.gather(t, counts) for t in (x, weights, ids))
        return Rows(x, weights, self.mine(ids), counts=counts)

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        """Rows of all ranks in their order."""
        blocks = [own.new_zeros(n, own.shape[1]) for n in counts]
        for source, block in enumerate(blocks):
            block = block.copy_(own) if source == self.rank else block
            dist.broadcast(block, group=self.group, group_src=self.source(source))
        return torch.cat(blocks)

    def source(self, rank: int) -> int:
        return rank

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        return self.own(self.reduce(out.clone()), d.memory["counts"]).clone()

    def reduce(self, out: Tensor) -> Tensor:
        dist.all_reduce(out, group=self.group)
        return out

    def own(self, out: Tensor, counts: list[int]) -> Tensor:
        start = sum(counts[: self.rank])
        return out[start : start + counts[self.rank]]


class Copies(Base):
    """One row per (token, slot), all_to_all there and back."""

    scheme = "all_to_all"

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        tokens, slots, targets = self.copies(ids)
        sent = torch.bincount(targets, minlength=self.ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        splits = (received.tolist(), sent.tolist())
        rows = self.exchange(self.payload(x, tokens), *splits)
        sent_weights = self.exchange(self.weights(weights, tokens, slots), *splits)
        local = self.exchange(self.sent_ids(ids, tokens, slots), *splits)
        return Rows(rows, sent_weights, local, tokens=tokens, slots=slots, splits=splits, shape=ids.shape)

    def copies(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, slots and destinations of what is sent, grouped by destination."""
        owners = self.owners(ids)
        tokens, slots = (owners >= 0).nonzero(as_tuple=True)
        order = owners[tokens, slots].argsort(stable=True)
        return tokens[order], slots[order], owners[tokens, slots][order]

    def payload(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x[tokens]

    def weights(self, weights: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return weights[tokens, slots, None]

    def sent_ids(self, ids: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return self.local(ids)[tokens, slots, None]

    def exchange(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        received, sent = d.memory["splits"]
        return self.scatter(self.exchange(out, sent, received), d)

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        slots = rows.new_zeros(*d.memory["shape"], rows.shape[1])
        slots[d.memory["tokens"], d.memory["slots"]] = rows
        return slots.sum(1)


class Deduplicated(Base):
    """Each token once per rank that owns one of its experts."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        targets, tokens = self.needed(ids).T.nonzero(as_tuple=True)
        sent = torch.bincount(targets, minlength=self.ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        splits = (received.tolist(), sent.tolist())
        foreign = self.owners(ids)[tokens] != targets[:, None]
        local = self.masked(self.local(ids)[tokens], foreign)
        parts = (self.exchange(t, *splits) for t in (x[tokens], weights[tokens], local))
        return Rows(*parts, tokens=tokens, splits=splits, count=len(x))

    def needed(self, ids: Tensor) -> Tensor:
        """[T, R]: which ranks each token goes to."""
        return (self.owners(ids)[:, :, None] == torch.arange(self.ranks)).any(1)

    def masked(self, local: Tensor, foreign: Tensor) -> Tensor:
        return local.masked_fill(foreign, -1)

    exchange = Copies.exchange

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        received, sent = d.memory["splits"]
        rows = self.exchange(out, sent, received)
        return rows.new_zeros(d.memory["count"], rows.shape[1]).index_add_(0, d.memory["tokens"], rows)
