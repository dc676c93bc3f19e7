"""Faults of ownership and ids: which rank holds an expert, and what its ids are there."""

import torch
from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked
from moe_harness.harness.stages.dispatcher.faults._bases import Copies, Deduplicated, Gathered


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
