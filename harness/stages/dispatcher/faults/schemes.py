"""Faults of dispatch and combine: ownership, ids, order, counts, reductions, collectives left out, memory.

They are made from right dispatchers in small replaceable steps, which come first.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked

# Right dispatchers ----------------------------------------------------------------------------------------------


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


# Ownership and ids ----------------------------------------------------------------------------------------------


@ranked(
    "EP", source="vllm-project/vllm/pull/46408", condition="an id of -1 and the last expert local",
    shows="R=2,E=3,k=2,T=3+3,ids=none", hidden=("R=2,E=3,k=2,T=3+3",),
)  # fmt: skip
class negative_id_wraps(Gathered):
    """Masked slots run through the last expert of the rank that owns it."""

    def mine(self, ids: Tensor) -> Tensor:
        return torch.where(self.owner[ids] == self.rank, self.place[ids], -1)

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        return super().gather(own, counts).nan_to_num(1.0) if own.is_floating_point() else super().gather(own, counts)


@ranked(
    "EP", source="NVIDIA/TensorRT-LLM/pull/13888", condition="R does not divide E", shows="R=2,E=3,k=2,T=2+2",
    seen_by="contract", hidden=("R=2,E=4,k=2,T=2+2",),
)  # fmt: skip
class owner_by_division(Copies):
    """The tail experts belong to nobody and their tokens are lost."""

    def owners(self, ids: Tensor) -> Tensor:
        rank = ids // max(self.num_experts // self.ranks, 1)
        return torch.where((ids < 0) | (rank >= self.ranks), -1, rank)


@ranked(
    "EP", source="vllm-project/vllm/pull/57465", condition="the expert group is not the tensor group",
    shows="R=2,E=4,k=2,T=2+2", hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class rank_of_tensor_group(Gathered):
    """Ranks take the experts of another rank for their own."""

    def mine(self, ids: Tensor) -> Tensor:
        return torch.where(self.owners(ids) == self.rank // 2, self.local(ids), -1)


@ranked(
    "EP", source="vllm-project/vllm-ascend/pull/5311", condition="experts not in equal blocks",
    shows="R=2,E=4,k=2,T=2+2,owner=cyclic", hidden=("R=2,E=4,k=2,T=2+2",),
)  # fmt: skip
class local_id_by_offset(Copies):
    """Local ids are counted from a block start that does not exist."""

    def local(self, ids: Tensor) -> Tensor:
        per_rank = max(self.num_experts // self.ranks, 1)
        return torch.where(ids < 0, -1, (ids % per_rank).clamp(max=self.num_experts - 1))


@ranked(
    "EP", source="flashinfer-ai/flashinfer/pull/3892", condition="rank >= 1", shows="R=2,E=4,k=2,T=2+2",
    seen_by="contract", hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class global_ids_returned(Copies):
    """Global ids are returned where local ones are meant."""

    def sent_ids(self, ids: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return ids[tokens, slots, None]


@ranked("EP", condition="a slot of another rank", shows="R=2,E=4,k=2,T=2+2", hidden=("R=1,E=4,k=2,T=3",))
class foreign_slot_to_expert_zero(Deduplicated):
    """Slots of other ranks run through local expert 0."""

    def masked(self, local: Tensor, foreign: Tensor) -> Tensor:
        mine = int((self.owner == self.rank).sum())
        return local.masked_fill(foreign, 0) if mine else local.masked_fill(foreign, -1)


@ranked("EP", condition="two slots of a token on one rank", shows="R=2,E=4,k=3,T=3+3", hidden=("R=2,E=4,k=1,T=3+3",))
class one_slot_per_rank(Deduplicated):
    """Only the first local slot of a token is run."""

    def masked(self, local: Tensor, foreign: Tensor) -> Tensor:
        local = local.masked_fill(foreign, -1)
        return torch.where((local >= 0).cumsum(1) > 1, -1, local)


@ranked(
    "EP", condition="the same expert twice in a row", shows="R=2,E=3,k=2,T=2+2,ids=duplicates",
    hidden=("R=2,E=3,k=2,T=2+2",),
)  # fmt: skip
class duplicate_counted_once(Copies):
    """A repeated expert counts once."""

    def owners(self, ids: Tensor) -> Tensor:
        earlier = torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), -1)
        repeated = ((ids[:, :, None] == ids[:, None, :]) & earlier).any(2)
        return super().owners(ids).masked_fill(repeated, -1)


# Rows, weights, order -------------------------------------------------------------------------------------------


@ranked(
    "EP", source="vllm-project/vllm-ascend/pull/11921", condition="ranks with different tokens",
    shows="R=2,E=3,k=1,T=2+2", hidden=("R=1,E=3,k=1,T=3",),
)  # fmt: skip
class finalize_not_reverse(Gathered):
    """Each rank gets back the tokens of another."""

    def own(self, out: Tensor, counts: list[int]) -> Tensor:
        end = len(out) - sum(counts[: self.rank])
        return out[end - counts[self.rank] : end]


@ranked(
    "EP", source="sgl-project/sglang/pull/28216", condition="more than one rank", shows="R=2,E=3,k=1,T=2+2",
    hidden=("R=1,E=3,k=1,T=3",),
)  # fmt: skip
class first_of_the_list(Gathered):
    """Every rank runs and returns the tokens of rank 0."""

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        rows = super().gather(own, counts)
        return rows[torch.arange(len(rows)) % max(counts[0], 1)]


@ranked("EP", source="vllm-project/vllm/pull/32705", condition="more than one rank", shows="R=2,E=3,k=1,T=2+2")
class broadcast_from_rank_zero(Gathered):
    """All ranks get rank 0's buffer for everybody's tokens."""

    def source(self, rank: int) -> int:
        return 0


@ranked(
    "EP", source="sgl-project/sglang/pull/40672", condition="other ranks hold tokens", shows="R=2,E=4,k=2,T=2+3",
    hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class bound_by_own_count(Gathered):
    """Gathered rows beyond the rank's own count are taken for padding."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        d = super().dispatch(x, weights, ids)
        d.topk_ids[len(x) :] = -1
        return d


@ranked("EP", condition="more than one copy", shows="R=2,E=4,k=2,T=3+3", hidden=("R=2,E=4,k=1,T=1+1",))
class results_in_order_of_arrival(Copies):
    """Results come back in the order of arrival, not of the tokens."""

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        order = d.memory["tokens"].argsort(stable=True)
        d.memory["tokens"], d.memory["slots"] = d.memory["tokens"][order], d.memory["slots"][order]
        return super().scatter(rows, d)


@ranked("EP", condition="the sort by destination is not the identity", shows="R=2,E=4,k=2,T=3+3")
class permutation_for_inverse(Copies):
    """The sort's permutation is applied where its inverse is meant."""

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        key = d.memory["tokens"] * d.memory["shape"][1] + d.memory["slots"]
        return super().scatter(rows[key.argsort().argsort()] if len(key) else rows, d)


@ranked("EP", condition="two slots of one token on different ranks", shows="R=2,E=4,k=2,T=3+3")
class weights_not_permuted(Copies):
    """Weights travel in the order of the slots, rows in that of the ranks."""

    def weights(self, weights: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        order = (tokens * weights.shape[1] + slots).argsort()
        return weights[tokens[order], slots[order], None]


@ranked("EP", condition="weights other than 1", shows="R=2,E=4,k=2,T=2+2")
class weights_not_sent(Copies):
    """Weights are not sent; every slot counts the same."""

    def weights(self, weights: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return torch.ones_like(weights[tokens, slots, None])


@ranked("EP", condition="weights other than 1", shows="R=2,E=4,k=2,T=2+2")
class weights_applied_again(Copies):
    """Weights are applied by the owner and again at the source."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        d = super().dispatch(x, weights, ids)
        d.memory["weights"] = weights
        return d

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        weights = d.memory["weights"][d.memory["tokens"], d.memory["slots"], None]
        return super().scatter((rows * weights).to(rows.dtype), d)


@ranked("EP", condition="a token with a local expert", shows="R=2,E=4,k=2,T=2+2")
class own_copies_lost(Copies):
    """Copies for the rank itself are not run."""

    def owners(self, ids: Tensor) -> Tensor:
        owners = super().owners(ids)
        return owners.masked_fill(owners == self.rank, -1)


@ranked("EP", condition="one expert chosen by many", shows="R=2,E=4,k=2,T=6+6,ids=hot", hidden=("R=2,E=4,k=1,T=1+1",))
class copies_beyond_capacity_dropped(Copies):
    """Copies beyond an expert's capacity are dropped."""

    def owners(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        before = torch.stack([(flat[:i] == flat[i]).sum() for i in range(len(flat))]) if len(flat) else flat
        return super().owners(ids).masked_fill(before.view(ids.shape) >= 4, -1)


@ranked(
    "EP", source="vllm-project/vllm/pull/21963", condition="more tokens than a chunk", shows="R=2,E=4,k=2,T=3+6",
    hidden=("R=2,E=4,k=2,T=2+4",),
)  # fmt: skip
class sizes_of_first_chunk(Copies):
    """Tokens beyond the first chunk are not dispatched."""

    CHUNK = 4

    def owners(self, ids: Tensor) -> Tensor:
        return super().owners(ids).masked_fill(torch.arange(len(ids))[:, None] >= self.CHUNK, -1)


@ranked(
    "EP", source="vllm-project/vllm-ascend/pull/1856", condition="more than one rank", shows="R=2,E=4,k=2,T=2+2",
    hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class no_op_base_class(Base):
    """Neither dispatch nor combine does anything."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        return Rows(x.clone(), weights.clone(), self.mine(ids))

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        return out.clone()


@ranked(
    "EP", source="deepspeedai/DeepSpeed/pull/8213", condition="one rank, k > 1", shows="R=1,E=4,k=2,T=3",
    seen_by="contract", hidden=("R=2,E=4,k=2,T=2+2",),
)  # fmt: skip
class one_rank_skips_combine(Copies):
    """With one rank the rows of all slots are returned unsummed."""

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        return rows if self.ranks == 1 else super().scatter(rows, d)


@ranked("EP", condition="NaN in one token", shows="R=2,E=4,k=2,T=3+3,ids=nan", hidden=("R=2,E=4,k=2,T=3+3",))
class combine_by_one_hot_product(Copies):
    """Rows are placed by a product with 0 and 1, so one NaN spoils every token."""

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        places = torch.arange(d.memory["shape"][0])[:, None] == d.memory["tokens"]
        return (places.double() @ rows.double()).to(rows.dtype)


# Reductions and precision ---------------------------------------------------------------------------------------


@ranked(
    "TP", source="vllm-project/vllm/pull/28277", condition="more than one rank", shows="R=2,E=4,k=2,T=3+3",
    seen_by="dense", hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class reduced_again(Gathered):
    """A result that is complete is summed over the ranks again."""

    def reduce(self, out: Tensor) -> Tensor:
        out = super().reduce(out)
        return super().reduce(out)


@ranked(
    "TP", source="sgl-project/sglang/issues/36879", condition="more than one rank", shows="R=2,E=4,k=2,T=3+3",
    hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class never_reduced(Gathered):
    """Each rank keeps its own part of the sum."""

    def reduce(self, out: Tensor) -> Tensor:
        return out


@ranked(
    "TP", source="sgl-project/sglang/pull/32963", condition="experts over two axes of ranks",
    shows="R=4,E=8,k=4,T=2+2+2+2", hidden=("R=2,E=4,k=2,T=2+2",),
)  # fmt: skip
class reduced_over_one_axis(Gathered):
    """The sum runs over one axis of the ranks only."""

    def reduce(self, out: Tensor) -> Tensor:
        everyone = [torch.empty_like(out) for _ in range(self.ranks)]
        dist.all_gather(everyone, out, group=self.group)
        first = self.rank // 2 * 2
        return torch.stack(everyone[first : first + 2]).sum(0)


@ranked("TP", condition="more than one rank", shows="R=2,E=4,k=2,T=3+3", hidden=("R=1,E=4,k=2,T=3",))
class averaged(Gathered):
    """The parts are averaged instead of summed."""

    def reduce(self, out: Tensor) -> Tensor:
        return super().reduce(out) / self.ranks


@ranked("precision", condition="fp32", shows="R=2,E=4,k=2,T=3+3", hidden=("R=2,E=4,k=2,T=3+3,dtype=bf16",))
class payload_in_bf16(Copies):
    """Hidden states travel in bf16."""

    def payload(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x[tokens].bfloat16().to(x.dtype)


@ranked("precision", condition="fp32 weights", shows="R=2,E=4,k=2,T=3+3", hidden=("R=2,E=4,k=2,T=3+3,dtype=bf16",))
class weights_in_bf16(Copies):
    """Routing weights travel in the dtype of the model."""

    def weights(self, weights: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        return super().weights(weights, tokens, slots).bfloat16().to(weights.dtype)


@ranked("precision", condition="fp32", shows="R=2,E=4,k=2,T=3+3", hidden=("R=2,E=4,k=2,T=3+3,dtype=bf16",))
class summed_in_bf16(Gathered):
    """The sum over ranks is rounded to bf16."""

    def reduce(self, out: Tensor) -> Tensor:
        return super().reduce(out.bfloat16()).to(out.dtype)


# Replicated tokens ----------------------------------------------------------------------------------------------


@ranked(
    "EP", source="NVIDIA/TransformerEngine/pull/2642", condition="tokens differ between ranks",
    shows="R=2,E=4,k=2,T=3+3", hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class allreduce_of_distinct_tokens(no_op_base_class):
    """Tokens of different requests are added to each other."""

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        total = out.clone()
        dist.all_reduce(total, group=self.group)
        return total


# Collectives that do not match ----------------------------------------------------------------------------------


@ranked(
    "EP", source="vllm-project/vllm/pull/53578", condition="a rank without tokens", shows="R=2,E=3,k=1,T=0+2",
    seen_by="ranks", hidden=("R=2,E=3,k=1,T=2+2",),
)  # fmt: skip
class empty_rank_skips(Copies):
    """A rank without tokens returns early and all others wait for ever."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        if len(x) == 0:
            return Rows(x.clone(), weights.clone(), ids.clone(), skipped=True)
        return super().dispatch(x, weights, ids)

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        return out.clone() if d.memory.get("skipped") else super().combine(out, d)


@ranked(
    "EP", source="sgl-project/sglang/pull/25397", condition="a rank without tokens", shows="R=2,E=3,k=1,T=0+2",
    seen_by="refusal", hidden=("R=2,E=3,k=1,T=2+2",),
)  # fmt: skip
class empty_rank_refuses(Copies):
    """A rank without tokens refuses alone and leaves the others waiting."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        if len(x) == 0:
            raise ValueError("no tokens")
        return super().dispatch(x, weights, ids)


@ranked(
    "EP", condition="a rank without experts", shows="R=2,E=3,k=1,T=2+2,owner=last_empty", seen_by="ranks",
    hidden=("R=2,E=4,k=4,T=2+2",),
)  # fmt: skip
class idle_rank_skips_combine(Gathered):
    """A rank that received nothing skips the way back."""

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        if not bool((d.topk_ids >= 0).any()):
            return self.own(out, d.memory["counts"]).clone()
        return super().combine(out, d)


@ranked(
    "EP", source="PrimeIntellect-ai/prime-rl/pull/3411", condition="ragged tokens", shows="R=2,E=3,k=1,T=1+5",
    seen_by="ranks", hidden=("R=2,E=3,k=1,T=2+2",),
)  # fmt: skip
class rounds_from_own_count(Gathered):
    """Each rank makes as many rounds as its own tokens need."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        for _ in range(len(x) // 4):
            self.counts(len(x))
        return super().dispatch(x, weights, ids)


@ranked(
    "EP", source="lightseekorg/tokenspeed/pull/419", condition="ragged tokens", shows="R=2,E=3,k=1,T=1+3",
    seen_by="ranks", hidden=("R=2,E=3,k=1,T=2+2",),
)  # fmt: skip
class equal_counts_assumed(Gathered):
    """Every rank takes its own number of tokens for everybody's."""

    def counts(self, own: int) -> list[int]:
        return [own] * self.ranks


@ranked("EP", condition="uneven routing", shows="R=2,E=3,k=2,T=1+4", hidden=("R=1,E=3,k=2,T=3",))
class splits_exchanged(Copies):
    """The sizes of what is sent and of what is received are exchanged."""

    def exchange(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        if rows.shape[1] == 1:
            return super().exchange(rows, received, sent)
        out = rows.new_empty(sum(sent), rows.shape[1])
        padded = torch.cat([rows, rows.new_zeros(max(sum(received) - len(rows), 0), rows.shape[1])])
        dist.all_to_all_single(out, padded[: sum(received)], sent, received, group=self.group)
        return torch.cat([out, out.new_zeros(max(sum(received) - len(out), 0), rows.shape[1])])[: sum(received)]


@ranked("EP", condition="more than one rank", shows="R=2,E=3,k=1,T=2+2", seen_by="ranks", hidden=("R=1,E=3,k=1,T=3",))
class equal_shapes_swapped(Gathered):
    """Odd ranks make two collectives of equal shape in the other order."""

    def reduce(self, out: Tensor) -> Tensor:
        halves = [out * 0.5, out * 0.5]
        steps = [lambda: self.sum_first(halves[0]), lambda: self.sum_second(halves[1])]
        for step in steps[:: 1 - 2 * (self.rank % 2)]:
            step()
        return halves[0] + halves[1]

    def sum_first(self, half: Tensor) -> None:
        dist.all_reduce(half, group=self.group)

    def sum_second(self, half: Tensor) -> None:
        dist.all_reduce(half, group=self.group)


# Memory, state, volume ------------------------------------------------------------------------------------------


@ranked(
    "memory", condition="two dispatches before a combine", shows="R=2,E=4,k=2,T=3+3", check="live",
    hidden=("R=2,E=4,k=2,T=3+3",),
)  # fmt: skip
class route_kept_on_the_object(Copies):
    """What combine needs is kept on the object and lost at the next dispatch."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        d = super().dispatch(x, weights, ids)
        self.route = {"tokens": d.memory["tokens"], "slots": d.memory["slots"]}
        return d

    def scatter(self, rows: Tensor, d: Rows) -> Tensor:
        slots = rows.new_zeros(*d.memory["shape"], rows.shape[1])
        count = min(len(rows), len(self.route["tokens"]))
        tokens = self.route["tokens"][:count].clamp(max=len(slots) - 1)
        slots[tokens, self.route["slots"][:count]] = rows[:count]
        return slots.sum(1)


@ranked("memory", shows="R=2,E=4,k=2,T=3+3,ids=masked", seen_by="inputs", hidden=("R=2,E=4,k=2,T=3+3",))
class weights_zeroed_in_place(Copies):
    """Weights of masked slots are zeroed in the caller's tensor."""

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> Rows:
        return super().dispatch(x, weights.masked_fill_(ids < 0, 0), ids)


@ranked("memory", condition="one rank", shows="R=1,E=4,k=2,T=3", seen_by="inputs", hidden=("R=2,E=4,k=2,T=3+3",))
class one_rank_returns_its_inputs(Gathered):
    """With one rank the caller's tensors are handed out as received rows."""

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        return own if self.ranks == 1 else super().gather(own, counts)


@ranked(
    "EP", source="vllm-project/vllm/pull/24982", condition="more than one rank", shows="R=2,E=4,k=2,T=3+3",
    seen_by="volume", hidden=("R=1,E=4,k=2,T=3",),
)  # fmt: skip
class copies_to_everybody(Gathered):
    """Every copy is sent to every rank, which throws most of them away."""

    scheme = "all_to_all"
