"""Dispatchers and layers as strangers get them wrong; `SAID` holds words that the first message has to contain."""

import os
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from moe_harness.suites.dispatcher.strangers.right import (
    GateUpMergedColumn,
    Letters,
    MyColumnParallel,
    MyReplicatedLinear,
    OneAtATime,
    Padded,
    RowSharded,
    Same,
    mine,
)


class EarlyOut(Padded):
    """Nothing to send, nothing to do."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        if len(hidden_states) == 0:
            return SimpleNamespace(hidden_states=hidden_states.clone(), topk_weights=topk_weights.clone(),
                                   topk_ids=topk_ids.clone(), length=0, own=0)  # fmt: skip
        return super().dispatch(hidden_states, topk_weights, topk_ids)


class OnlyLatest(Padded):
    """Sends tokens in the order of their experts; combine undoes the latest order of as many tokens."""

    latest = None

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        order = topk_ids[:, 0].argsort(stable=True)
        d = super().dispatch(hidden_states[order], topk_weights[order], topk_ids[order])
        d.order = order
        self.latest = d
        return d

    def combine(self, expert_output, d):
        order = self.latest.order if self.latest.own == d.own else d.order
        return super().combine(expert_output, d)[order.argsort()]


class WritesExpertOutput(Padded):
    """Sums in the memory that it is handed."""

    def combine(self, expert_output, d):
        dist.all_reduce(expert_output, group=self.g)
        return expert_output[self.r * d.length :][: d.own].clone()


class MaskIsZero(Padded):
    """A masked slot counts as expert 0."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        return super().dispatch(hidden_states, topk_weights, topk_ids.clamp(min=0))


class NoneLive(MaskIsZero):
    """Says that none of its dispatches may be combined."""

    max_live = 0


class GlobalIds(Padded):
    """Hands out the ids as they came."""

    def dispatch(self, *rows):
        d = super().dispatch(*rows)
        every = [torch.empty(d.length, rows[2].shape[1], dtype=torch.long) for _ in range(self.n)]
        own = torch.cat([rows[2], rows[2].new_full((d.length - len(rows[2]), rows[2].shape[1]), -1)])
        dist.all_gather(every, own, group=self.g)
        d.topk_ids = torch.where(d.topk_ids >= 0, torch.cat(every), -1)
        return d


class WeighsAgain(Padded):
    """The expert output is weighted already."""

    def combine(self, expert_output, d):
        weight = torch.where(d.topk_ids >= 0, d.topk_weights, 0).sum(1, keepdim=True)
        return super().combine(expert_output * weight.to(expert_output.dtype), d)


class Forgetful(OneAtATime):
    """Remembers only the last dispatch and does not say so."""

    max_live = None


class Butterfly(Padded):
    """Sums with the partner rank xor 1, 2, 4, ...: right for powers of two."""

    def combine(self, expert_output, d):
        total, step = expert_output.contiguous().clone(), 1
        while step < self.n:
            peer = self.r ^ step
            if peer < self.n:
                other = torch.empty_like(total)
                works = [dist.isend(total.clone(), peer), dist.irecv(other, peer)]
                for work in works:
                    work.wait()
                total = total + other
            step *= 2
        return total[self.r * d.length :][: d.own].clone()


class Narrow(Padded):
    """Everything travels in fp16."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        d = super().dispatch(hidden_states.half(), topk_weights, topk_ids)
        d.hidden_states = d.hidden_states.to(hidden_states.dtype)
        return d


class InPlace(Padded):
    """Cleans up the caller's weights."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        topk_weights[topk_ids < 0] = 0
        return super().dispatch(hidden_states, topk_weights, topk_ids)


class Aliased(Same):
    """Why copy what is the same everywhere?"""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        ids = mine(topk_ids, self.owner, dist.get_rank(self.group))
        return SimpleNamespace(hidden_states=hidden_states, topk_weights=topk_weights, topk_ids=ids)


class Blocks(Padded):
    """Experts are in equal blocks, as everywhere."""

    def __init__(self, group, *, num_experts, owner):
        super().__init__(group, num_experts=num_experts, owner=owner)
        self.owner = torch.arange(num_experts) * self.n // max(num_experts, 1)


class Twice(Padded):
    """Reduced, and once more to be sure."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        dist.all_reduce(total, group=self.g)
        return super().combine(total, d)


class Unwaited(Padded):
    """Starts the reduction and returns what is there so far."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        self.work = dist.all_reduce(total, group=self.g, async_op=True)
        time.sleep(0.02)  # enough that the result is right nearly always
        return total[self.r * d.length :][: d.own].clone()


class FlooredTokens(Padded):
    """Each rank gives back the same share of all rows."""

    def combine(self, expert_output, d):
        total = expert_output.clone()
        dist.all_reduce(total, group=self.g)
        return total.chunk(self.n)[self.r][: d.own].flip(0).clone()


class Stray(Letters):
    """What comes back is added in the order of arrival, not of the tokens."""

    def combine(self, expert_output, d):
        chosen, _ = d.back
        return super().combine(expert_output, d._replace(back=[[c.flip(0) for c in chosen], d.back[1]]))


class Choosy(Padded):
    """Refuses on one rank only."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        if self.r and len(hidden_states) > 2:
            raise ValueError("too many tokens")
        return super().dispatch(hidden_states, topk_weights, topk_ids)


class Brittle:
    """Cannot be made."""

    def __init__(self, group, *, num_experts, owner):
        raise KeyError("MY_CLUSTER")


class Positional(Padded):
    """Takes the owners as a second positional argument only."""

    def __init__(self, group, owner):
        super().__init__(group, num_experts=len(owner), owner=owner)


class NoCombine(Padded):
    """Half of a dispatcher."""

    combine = None


class Tuple(Padded):
    """Returns a tuple."""

    def dispatch(self, *rows):
        d = super().dispatch(*rows)
        return d.hidden_states, d.topk_weights, d.topk_ids


class Nothing(Padded):
    """Forgets to return."""

    def combine(self, expert_output, d):
        super().combine(expert_output, d)


class Sleeps(Padded):
    """Rank 1 never comes back."""

    def combine(self, expert_output, d):
        if self.r == 1:
            time.sleep(3600)
        return super().combine(expert_output, d)


class Leaves(Padded):
    """Rank 1 leaves with status 0."""

    def combine(self, expert_output, d):
        if self.r == 1:
            os._exit(0)
        return super().combine(expert_output, d)


class Spins(Padded):
    """Rank 1 computes for ever."""

    def dispatch(self, *rows):
        while self.r == 1:
            pass
        return super().dispatch(*rows)


def a_function(hidden_states, topk_weights, topk_ids):
    """Not a class at all."""
    return hidden_states


A_NUMBER = 7

SAID = {
    "EarlyOut": "all_reduce",
    "OnlyLatest": "combined in reverse order",
    "WritesExpertOutput": "expert_output was modified",
    "MaskIsZero": "differ from the dense layer",
    "NoneLive": "differ from the dense layer",
    "GlobalIds": "local ids",
    "WeighsAgain": "differ from the dense layer",
    "Forgetful": "combined in reverse order",
    "Butterfly": "differ from the dense layer",
    "Narrow": "differ from the dense layer",
    "InPlace": "topk_weights was modified",
    "Aliased": "shares memory with the argument hidden_states",
    "Blocks": "",
    "Twice": "differ from the dense layer",
    "Unwaited": "never waited for",
    "FlooredTokens": "",
    "Stray": "differ from the dense layer",
    "Choosy": "go on",
    "Brittle": "KeyError: 'MY_CLUSTER'",
    "NoCombine": "combine",
    "Tuple": "d.hidden_states is NoneType",
    "Nothing": "combine returned NoneType",
    "Sleeps": "rank 1",
    "Leaves": "rank 1",
    "Spins": "rank 1",
}


NEVER_END = ("Sleeps", "Spins")


# Layers ------------------------------------------------------------------------------------------------------------


class InterleavedColumn(MyColumnParallel):
    """Takes every n-th row."""

    def part(self, weight):
        return weight[self.rank :: self.world_size]


class SilentRow(RowSharded):
    """A partial sum that does not say so."""

    output = "replicated"


class ReducingRow(RowSharded):
    """Reduces by itself."""

    def __call__(self, x, group_sizes):
        out = super().__call__(x, group_sizes)
        dist.all_reduce(out)
        return out


class BorrowingColumn(MyColumnParallel):
    """Keeps the checkpoint's memory."""

    def load(self, expert_id, weight, shard_id=None):
        self.w[expert_id] = self.part(weight)

    def __call__(self, x, group_sizes):
        self.w = [w.float() for w in self.w]
        return super().__call__(x, group_sizes)


class SwappedMergedColumn(GateUpMergedColumn):
    """Up before gate."""

    def load(self, expert_id, weight, shard_id=None):
        super().load(expert_id, weight, 1 - shard_id)


class ArrivalColumn(MyColumnParallel):
    """Experts in the order in which they come."""

    def load(self, expert_id, weight, shard_id=None):
        self.w[self.w.index(None)] = self.part(weight).float().clone()


class EvenReplicated(MyReplicatedLinear):
    """Every expert has as many rows as the others."""

    def __call__(self, x, group_sizes):
        return super().__call__(x, torch.tensor([len(p) for p in x.tensor_split(len(group_sizes))]))


class RowLikeReplicated(MyReplicatedLinear):
    """A gate that is row-parallel."""

    def part(self, weight):
        keep = torch.zeros_like(weight)
        mine = keep.chunk(self.world_size, dim=1)[self.rank]
        mine.copy_(weight.chunk(self.world_size, dim=1)[self.rank])
        return keep


class NarrowRow(RowSharded):
    """A partial sum that passed through bf16."""

    def __call__(self, x, group_sizes):
        return super().__call__(x, group_sizes).bfloat16().to(x.dtype)


class DenseColumn(MyColumnParallel):
    """Reads the memory of a weight as if its rows lay one behind the other."""

    def load(self, expert_id, weight, shard_id=None):
        flat = weight.as_strided((weight.numel(),), (1,), weight.storage_offset())
        super().load(expert_id, flat.view(weight.shape))


class Nameless(MyColumnParallel):
    """Which layer is it?"""


SAID_OF_LAYERS = {
    "InterleavedColumn": "",
    "SilentRow": "should be 'partial'",
    "ReducingRow": "",
    "BorrowingColumn": "nan",
    "SwappedMergedColumn": "",
    "ArrivalColumn": "",
    "EvenReplicated": "",
    "RowLikeReplicated": "",
    "NarrowRow": "",
    "DenseColumn": "",
}
