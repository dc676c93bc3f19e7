"""Faults of rows, weights and their order on the way out and back."""

import torch
from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked
from moe_harness.harness.stages.dispatcher.faults._bases import Base, Copies, Gathered, Rows


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
