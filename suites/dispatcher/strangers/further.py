"""Dispatchers in further styles, all right, and what goes wrong beside values: formats, memory, state, places."""

import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from moe_harness.suites.dispatcher.strangers.right import local_numbers


class Base:
    """Who owns what."""

    def __init__(self, group, *, num_experts, owner):
        self.group, self.owner, self.numbers = group, owner.clone(), local_numbers(owner)
        self.me, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def of(self, ids, rank):
        """Local ids on `rank`, -1 for all others."""
        at = ids.clamp(min=0)
        return torch.where((ids >= 0) & (self.owner[at] == rank), self.numbers[at], -1)

    def counts(self, own):
        found = [torch.zeros(1, dtype=torch.long) for _ in range(self.ranks)]
        dist.all_gather(found, torch.tensor([own]), group=self.group)
        return [int(count) for count in found]


class ScatteredSum(Base):
    """Equal blocks and a reduce_scatter; rows are a view of a wider matrix, weights fp64, ids int16."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        longest = max(self.counts(len(hidden_states)))

        def everywhere(t, fill):
            padded = torch.full((longest, t.shape[1]), fill, dtype=t.dtype)
            padded[: len(t)] = t
            return functional.wait_tensor(functional.all_gather_tensor(padded, 0, self.group))

        wide = torch.zeros(longest * self.ranks, hidden_states.shape[1] + 3, dtype=hidden_states.dtype)
        wide[:, 1:-2] = everywhere(hidden_states, 0.0)
        ids = self.of(everywhere(topk_ids, -1), self.me).to(torch.int16)
        return SimpleNamespace(hidden_states=wide[:, 1:-2], topk_weights=everywhere(topk_weights, 0.0).double(),
                               topk_ids=ids, own=len(hidden_states), longest=longest)  # fmt: skip

    def combine(self, expert_output, d):
        out = expert_output.new_empty(d.longest, expert_output.shape[1])
        dist.reduce_scatter_tensor(out, expert_output.contiguous(), group=self.group)
        return out[: d.own]


class Server(Base):
    """The first rank sorts objects out; a row for each slot."""

    def _through(self, mine, sort):
        box = [None] * self.ranks if self.me == 0 else None
        dist.gather_object(mine, box, group=self.group, group_dst=0)
        found = [None]
        dist.scatter_object_list(found, sort(box) if self.me == 0 else None, group=self.group, group_src=0)
        return found[0]

    def dispatch(self, *rows):
        def sort(box):
            parts = []
            for rank in range(self.ranks):
                local = [self.of(ids, rank) for _, _, ids in box]
                places = [(local_ids >= 0).nonzero() for local_ids in local]
                taken = [[x[p[:, 0]], w[p[:, 0], p[:, 1], None], i[p[:, 0], p[:, 1], None]]
                         for (x, w, _), i, p in zip(box, local, places, strict=True)]  # fmt: skip
                parts.append((*(torch.cat(t) for t in zip(*taken, strict=True)), places))
            return parts

        x, weights, ids, places = self._through(rows, sort)
        return SimpleNamespace(hidden_states=x, topk_weights=weights, topk_ids=ids, places=places, own=len(rows[0]))

    def combine(self, expert_output, d):
        def sort(box):
            outs = [torch.zeros(own, rows.shape[1], dtype=torch.float64) for rows, _, own in box]
            for rows, places, _ in box:
                for out, part, p in zip(outs, rows.double().split([len(p) for p in places]), places, strict=True):
                    out.index_add_(0, p[:, 0], part)
            return outs

        return self._through((expert_output, d.places, d.own), sort).to(expert_output.dtype)


class SpareRows(Base):
    """Broadcasts in threads; rows that nobody uses hold NaN; a reduce to each rank."""

    def _apart(self, work):
        box = []
        thread = threading.Thread(target=lambda: box.append(work()))
        thread.start()
        thread.join()
        return box[0]

    def _everybodys(self, t, counts):
        pieces = [t.contiguous().clone() if rank == self.me else t.new_empty(n, t.shape[1])
                  for rank, n in enumerate(counts)]  # fmt: skip
        for rank, piece in enumerate(pieces):
            if len(piece):
                dist.broadcast(piece, group=self.group, group_src=rank)
        return torch.cat([*pieces, torch.full((5, t.shape[1]), -1 if t.dtype == torch.long else torch.nan).to(t.dtype)])

    def dispatch(self, *rows):
        counts = self._apart(lambda: self.counts(len(rows[0])))
        x, weights, ids = self._apart(lambda: [self._everybodys(t, counts) for t in rows])
        return SimpleNamespace(hidden_states=x, topk_weights=weights, topk_ids=self.of(ids, self.me), counts=counts)

    def combine(self, expert_output, d):
        pieces = [piece.contiguous().clone() for piece in expert_output[: sum(d.counts)].split(d.counts)]
        for rank, piece in enumerate(pieces):
            if len(piece):
                dist.reduce(piece, group=self.group, group_dst=rank)
        return pieces[self.me]


class OneMessage(Base):
    """Rows, weights and ids side by side in fp64, one all_to_all; a token once for each rank."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        packed = torch.cat([t.double() for t in (hidden_states, topk_weights.nan_to_num(0), topk_ids)], 1)
        needed = [(self.of(topk_ids, rank) >= 0).any(1) for rank in range(self.ranks)]
        sent, got = [int(mask.sum()) for mask in needed], torch.empty(self.ranks, dtype=torch.long)
        dist.all_to_all_single(got, torch.tensor(sent), group=self.group)
        got = got.tolist()
        rows = packed.new_empty(sum(got), packed.shape[1])
        dist.all_to_all_single(rows, torch.cat([packed[mask] for mask in needed]), got, sent, group=self.group)
        x, weights, ids = rows.split([hidden_states.shape[1], *[topk_ids.shape[1]] * 2], 1)
        return SimpleNamespace(
            hidden_states=x.to(hidden_states.dtype), topk_weights=weights.to(topk_weights.dtype),
            topk_ids=self.of(ids.long(), self.me), got=got, sent=sent, needed=needed,
        )  # fmt: skip

    def combine(self, expert_output, d):
        back = expert_output.new_empty(sum(d.sent), expert_output.shape[1])
        dist.all_to_all_single(back, expert_output.contiguous(), d.sent, d.got, group=self.group)
        out = expert_output.new_zeros(len(d.needed[0]), expert_output.shape[1])
        for mask, part in zip(d.needed, back.split(d.sent), strict=True):
            out[mask] += part
        return out


# Wrong ones ----------------------------------------------------------------------------------------------------------


def as_it_lies(t):
    return t.as_strided(t.shape, (t.shape[1], 1)).clone()


class SentAsHalf(OneMessage):
    """bf16 rows travel as fp16, which has more bits and less range."""

    def dispatch(self, hidden_states, *routing):
        narrow = hidden_states.half() if hidden_states.dtype == torch.bfloat16 else hidden_states
        d = super().dispatch(narrow, *routing)
        d.hidden_states = d.hidden_states.to(hidden_states.dtype)
        return d


class ReturnedAsHalf(OneMessage):
    """bf16 results come back as fp16."""

    def combine(self, expert_output, d):
        narrow = expert_output.half() if expert_output.dtype == torch.bfloat16 else expert_output
        return super().combine(narrow, d).to(expert_output.dtype)


class ResultInItsBuffer(OneMessage):
    """What combine gives lies where the next dispatch packs."""

    result = None

    def dispatch(self, *rows):
        if self.result is not None:
            self.result.zero_()
        return super().dispatch(*rows)

    def combine(self, expert_output, d):
        self.result = super().combine(expert_output, d)
        return self.result


class CounterKept(OneMessage):
    """combine leaves a counter behind with which the next dispatch begins."""

    used = 0

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        return super().dispatch(hidden_states, topk_weights * (1 + self.used), topk_ids)

    def combine(self, expert_output, d):
        self.used = 1
        return super().combine(expert_output, d)


class OneBlockOfColumns(OneMessage):
    """Copies 1,024 columns."""

    def dispatch(self, hidden_states, *routing):
        hidden_states = hidden_states.clone()
        hidden_states[:, 1024:] = 0
        return super().dispatch(hidden_states, *routing)


class RowsAsTheyLie(OneMessage):
    """Looks at memory, not at strides."""

    def dispatch(self, hidden_states, *routing):
        return super().dispatch(as_it_lies(hidden_states), *routing)


class OutputAsItLies(OneMessage):
    """Looks at the memory of the experts' output."""

    def combine(self, expert_output, d):
        return super().combine(as_it_lies(expert_output), d)


class GivesTheOutputBack(OneMessage):
    """One rank has nothing to do."""

    def combine(self, expert_output, d):
        whole = self.ranks == 1 and bool(d.needed[0].all())
        return expert_output if whole else super().combine(expert_output, d)


class GivesTheWeightsBack(ScatteredSum):
    """One rank has nothing to send."""

    def dispatch(self, hidden_states, topk_weights, topk_ids):
        d = super().dispatch(hidden_states, topk_weights, topk_ids)
        if self.ranks == 1:
            d.topk_weights = topk_weights
        return d


class CountsOwnersFromItself(OneMessage):
    """Turns the owners into distances, in place."""

    def __init__(self, group, *, num_experts, owner):
        super().__init__(group, num_experts=num_experts, owner=owner)
        owner.sub_(self.me + 1)


SAID = {
    "SentAsHalf": ("dense/dtype=bf16,R=2,E=4,k=1,T=3+3", "differ from the dense layer"),
    "ReturnedAsHalf": ("dense/dtype=bf16,R=2,E=4,k=1,T=3+3", "differ from the dense layer"),
    "ResultInItsBuffer": ("dense/R=2,E=4,k=1,T=3+3", "dispatch 1 of 2"),
    "CounterKept": ("dense/R=2,E=4,k=1,T=3+3", "dispatch 1 after those were combined"),
    "OneBlockOfColumns": ("dense/R=2,E=4,k=1,T=3+3,H=2048", "differ from the dense layer"),
    "RowsAsTheyLie": ("dense/layout=hidden_states:padded,R=2,E=4,k=1,T=3+3", "differ from the dense layer"),
    "OutputAsItLies": ("dense/layout=expert_output:padded,R=2,E=4,k=1,T=3+3", "differ from the dense layer"),
    "GivesTheOutputBack": ("dense/R=1,E=1,k=1,T=3", "combine shares memory with the argument expert_output"),
    "GivesTheWeightsBack": ("dense/R=1,E=1,k=1,T=3", "d.topk_weights shares memory with the argument topk_weights"),
    "CountsOwnersFromItself": ("dense/R=2,E=4,k=1,T=3+3", "owner was modified"),
}
