"""Faults of memory, of state between calls, and of volume."""

from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked
from moe_harness.harness.stages.dispatcher.faults._bases import Copies, Gathered, Rows


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
