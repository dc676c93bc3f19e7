"""Faults of reductions, of their precision, and of collectives that do not match."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked
from moe_harness.harness.stages.dispatcher.faults._bases import Copies, Gathered, Rows
from moe_harness.harness.stages.dispatcher.faults.rows import no_op_base_class


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
