"""Dispatchers and layers as strangers write them from the contract alone; all of them are right."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist


def local_numbers(owner):
    """[E], the place of each expert among those of its rank."""
    seen, out = {}, []
    for rank in owner.tolist():
        out.append(seen.setdefault(rank, 0))
        seen[rank] += 1
    return torch.tensor(out, dtype=torch.long)


def mine(ids, owner, rank):
    """Local ids, -1 for slots that are masked or somebody else's."""
    numbers = local_numbers(owner)
    return torch.tensor(
        [[int(numbers[e]) if e >= 0 and int(owner[e]) == rank else -1 for e in row] for row in ids.tolist()],
        dtype=torch.long,
    ).reshape(ids.shape)


class Padded:
    """Every rank sends as many rows as the longest holds."""

    def __init__(self, group, *, num_experts, owner):
        self.g, self.owner = group, owner
        self.r, self.n = dist.get_rank(group), dist.get_world_size(group)

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        longest = torch.tensor([len(hidden_states)])
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.g)
        pad = int(longest) - len(hidden_states)
        everywhere = []
        for t, fill in ((hidden_states, 0), (topk_weights, 0), (topk_ids, -1)):
            t = torch.cat([t, t.new_full((pad, t.shape[1]), fill)])
            out = [torch.empty_like(t) for _ in range(self.n)]
            dist.all_gather(out, t, group=self.g)
            everywhere.append(torch.cat(out))
        h, w, i = everywhere
        return SimpleNamespace(hidden_states=h, topk_weights=w, topk_ids=mine(i, self.owner, self.r),
                               length=int(longest), own=len(hidden_states))  # fmt: skip

    def combine(self, expert_output, d):
        total = expert_output.contiguous().clone()
        dist.all_reduce(total, group=self.g)
        return total[self.r * d.length :][: d.own].clone()


class Pickled(Padded):
    """Python objects there and back; sums in fp64."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        box = [None] * self.n
        dist.all_gather_object(box, (hidden_states, topk_weights, topk_ids), group=self.g)
        h, w, i = (torch.cat([b[k] for b in box]) for k in range(3))
        starts = [sum(len(b[0]) for b in box[:k]) for k in range(self.n + 1)]
        return SimpleNamespace(hidden_states=h, topk_weights=w, topk_ids=mine(i, self.owner, self.r), starts=starts)

    def combine(self, expert_output, d):
        box = [None] * self.n
        dist.all_gather_object(box, expert_output, group=self.g)
        total = sum(b.double() for b in box)
        return total[d.starts[self.r] : d.starts[self.r + 1]].to(expert_output.dtype)


class Row(NamedTuple):
    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    back: list
    size: int


class Letters:
    """isend and irecv between every two ranks, handles kept until the end; a token travels once per rank."""

    def __init__(self, group, *, num_experts, owner):
        self.group, self.owner = group, owner
        self.me, self.world = dist.get_rank(group), dist.get_world_size(group)

    def _swap(self, parts, lengths):
        """parts[q] goes to rank q; returns what came."""
        got = [parts[self.me] if q == self.me else parts[q].new_empty(lengths[q], *parts[q].shape[1:])
               for q in range(self.world)]  # fmt: skip
        pending = []
        for q in range(self.world):
            if q != self.me:
                peer = dist.get_global_rank(self.group, q)
                pending += [dist.isend(parts[q].contiguous(), peer, self.group), dist.irecv(got[q], peer, self.group)]
        for p in pending:
            p.wait()
        return got

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        per_rank = [mine(topk_ids, self.owner, q) for q in range(self.world)]
        chosen = [(local >= 0).any(1).nonzero().flatten() for local in per_rank]
        sizes = self._swap([torch.tensor([len(c)]) for c in chosen], [1] * self.world)
        lengths = [int(s) for s in sizes]
        h = self._swap([hidden_states[c] for c in chosen], lengths)
        w = self._swap([topk_weights[c] for c in chosen], lengths)
        i = self._swap([local[c] for local, c in zip(per_rank, chosen, strict=True)], lengths)
        return Row(torch.cat(h), torch.cat(w), torch.cat(i).int(), [chosen, lengths], len(hidden_states))

    def combine(self, expert_output, d):
        chosen, lengths = d.back
        came = self._swap(list(expert_output.split(lengths)), [len(c) for c in chosen])
        out = expert_output.new_zeros(d.size, expert_output.shape[1])
        for tokens, rows in zip(chosen, came, strict=True):
            out[tokens] += rows
        return out


class Overlapped(Padded):
    """The reduction is started and waited for later."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        work = dist.all_reduce(total, group=self.g, async_op=True)
        here = slice(self.r * d.length, self.r * d.length + d.own)
        work.wait()
        return total[here].clone()


class Wide(Padded):
    """Sums in fp32 and returns fp32, whatever came in."""

    def combine(self, expert_output, d):
        return super().combine(expert_output.float(), d)


class OneAtATime(Padded):
    """Remembers only the last dispatch, and says so."""

    max_live = 1

    def dispatch(self, *rows):
        self.last = super().dispatch(*rows)
        return SimpleNamespace(**{k: getattr(self.last, k) for k in ("hidden_states", "topk_weights", "topk_ids")})

    def combine(self, expert_output, d):
        return super().combine(expert_output, self.last)


class EvenOnly(Padded):
    """Takes equal numbers of tokens only, which every rank finds out and tells."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        counts = [torch.zeros(1, dtype=torch.long) for _ in range(self.n)]
        dist.all_gather(counts, torch.tensor([len(hidden_states)]), group=self.g)
        if len({int(c) for c in counts}) > 1:
            raise ValueError(f"ranks hold {[int(c) for c in counts]} tokens; this dispatcher takes equal numbers only")
        return super().dispatch(hidden_states, topk_weights, topk_ids)


class Same:
    """Tokens are the same everywhere; one sum in the end."""

    requires_replicated_tokens = True

    def __init__(self, group, *, num_experts, owner):
        self.group, self.owner = group, owner

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        ids = mine(topk_ids, self.owner, dist.get_rank(self.group))
        return SimpleNamespace(hidden_states=hidden_states.clone(), topk_weights=topk_weights.clone(), topk_ids=ids)

    def combine(self, expert_output, d):
        out = expert_output.clone()
        dist.all_reduce(out, group=self.group)
        return out


class HalfOnly(Padded):
    """fp16 and nothing else."""

    dtypes = ("fp16",)

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        if hidden_states.dtype != torch.float16:
            raise TypeError(f"fp16 only, not {hidden_states.dtype}")
        return super().dispatch(hidden_states, topk_weights, topk_ids)


# Layers ------------------------------------------------------------------------------------------------------------


class MyColumnParallel:
    """A list of weights, one product per expert, in fp32."""

    def __init__(self, num_experts, in_features, out_features, *, rank, world_size, dtype, device):
        self.rank, self.world_size, self.dtype = rank, world_size, dtype
        self.w = [None] * num_experts

    def part(self, weight):
        return weight.chunk(self.world_size)[self.rank]

    def load(self, expert_id, weight, shard_id=None):
        self.w[expert_id] = self.part(weight).float().clone()

    def __call__(self, x, group_sizes):
        rows = x.float().split(group_sizes.tolist())
        return torch.cat([r @ w.T for r, w in zip(rows, self.w, strict=True)]).to(x.dtype)


class MyReplicatedLinear(MyColumnParallel):
    """The whole weight."""

    def part(self, weight):
        return weight


class RowSharded(MyColumnParallel):
    """Says by attribute what it is."""

    kind, output = "row", "partial"

    def part(self, weight):
        return weight.chunk(self.world_size, dim=1)[self.rank]


class GateUpMergedColumn(MyColumnParallel):
    """Gate and up, kept apart until they are used."""

    def __init__(self, num_experts, in_features, out_features, **place):
        if len(set(out_features)) != 1 or len(out_features) != 2:
            raise NotImplementedError(f"gate and up of one size, not {out_features}")
        super().__init__(num_experts, in_features, out_features, **place)

    def load(self, expert_id, weight, shard_id=None):
        parts = self.w[expert_id] or {}
        parts[shard_id] = self.part(weight).float().clone()
        self.w[expert_id] = parts

    def __call__(self, x, group_sizes):
        rows = x.float().split(group_sizes.tolist())
        out = [torch.cat([r @ w[0].T, r @ w[1].T], 1) for r, w in zip(rows, self.w, strict=True)]
        return torch.cat(out).to(x.dtype)
