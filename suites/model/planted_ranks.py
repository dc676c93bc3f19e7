"""Published faults of models over ranks, as small changes of the engine; `plant` gets the rank it is called on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch.distributed as dist
from pytest import MonkeyPatch
from torch import Tensor

from moe_harness.impls.qwen3_moe import batch, expert_layouts, pieces, placement, ranks, scheduler, weights
from moe_harness.impls.qwen3_moe.network import Network
from moe_harness.suites.model.planting import MS, NV, V, around

SG = "github.com/sgl-project/sglang"


@dataclass(frozen=True)
class Planted:
    """One fault, where it was published, by what it is seen, and the model that shows it.

    `layout` are arguments of load_model, `changes` keys of config.json.
    """

    source: str
    plant: Callable[[MonkeyPatch, int], Any]
    seen: str = "logits differ"
    family: str = "qwen3_moe"
    layout: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Planted] = {}
EP: dict[str, Any] = {"expert_parallel": True, "dispatcher": "local_allreduce"}
SPLIT: dict[str, Any] = {"expert_parallel": True, "dispatcher": "all_to_all"}


def fault(source: str, **shown: Any) -> Callable[[Callable[[MonkeyPatch, int], Any]], None]:
    """Register the decorated function under its name."""

    def register(plant: Callable[[MonkeyPatch, int], Any]) -> None:
        FAULTS[plant.__name__] = Planted(source, plant, **shown)

    return register


@fault(f"{MS}/pull/113", seen="has planned another step")
def batch_order_from_a_set(patch: MonkeyPatch, rank: int) -> None:
    """Sequences that decode stand in another order on rank 1."""

    def plan(original: Callable, self: scheduler.Scheduler) -> scheduler.Step | None:
        step = original(self)
        if step is None or rank == 0:
            return step
        return scheduler.Step(step.work[: step.decoding][::-1] + step.work[step.decoding :], step.decoding)

    around(patch, scheduler.Scheduler, "plan", plan)


@fault(f"{MS}/pull/88", seen="drawn tokens differ")
def seeds_differ_by_rank(patch: MonkeyPatch, rank: int) -> None:
    def fill(original: Callable, self: batch.Builder, step: scheduler.Step, to: dict[str, Any]) -> batch.Filled:
        filled = original(self, step, to)
        to["seeds"] += rank
        return filled

    around(patch, batch.Builder, "_fill", fill)


@fault(f"{NV}/issues/187", layout={"pages": 12}, seen="number of elements is|planned another")
def page_count_by_rank(patch: MonkeyPatch, rank: int) -> None:
    """Each rank keeps its own number of pages; rank 1 has a few less and makes others wait sooner."""
    patch.setattr(ranks.Ranks, "smallest", lambda self, number: number - 2 * rank)


@fault(f"{NV}/issues/246", seen="prompts and options of generate of rank 1")
def command_buffer_without_acknowledgement(patch: MonkeyPatch, rank: int) -> None:
    """Prompts lie in one buffer that the first rank has written anew before the second reads it."""
    from moe_harness.impls.qwen3_moe.model import Model

    def generate(original: Callable, self: Model, prompts: list, **options: Any) -> list:
        buffer: list[Any] = [prompts[0]]
        first = [buffer[0]] if rank == 0 else None
        buffer[0] = prompts[1]
        dist.barrier()
        return original(self, (first or [buffer[0]]) + list(prompts[1:]), **options)

    around(patch, Model, "generate", generate)


@fault(f"{MS}/pull/98")
def head_gather_right_at_batch_1(patch: MonkeyPatch, rank: int) -> None:
    """The gathered shards [R, T, V / R] are read as [T, V]."""

    def columns(self: ranks.Ranks, own: Tensor, widths: list[int]) -> Tensor:
        gathered = own.new_empty(self.size * own.numel())
        ranks.all_gather(gathered, own.flatten(), self.group)
        return gathered.view(len(own), -1)

    patch.setattr(ranks.Ranks, "columns", columns)


@fault("github.com/vllm-project/vllm-gguf-plugin/issues/103")
def rank_0s_shard_everywhere(patch: MonkeyPatch, rank: int) -> None:
    """Merged projections take the first rank's rows; every shape fits."""

    def rows(self: pieces.Piece) -> range:
        merged = self.cut is not None and self.cut.dim == 0 and bool(self.index)
        return range(self.cut.size) if merged and self.cut is not None else original.fget(self)

    original: Any = pieces.Piece.rows
    patch.setattr(pieces.Piece, "rows", property(rows))


@fault("github.com/Wenyueh/MinivLLM/issues/80", changes={"attention_bias": True})
def bias_of_a_row_parallel_layer_on_every_rank(patch: MonkeyPatch, rank: int) -> None:
    def attention(original: Callable, self: weights.Layout, layer: str) -> Any:
        own, self.rank = self.rank, 0
        name = f"{layer}.self_attn.o_proj.bias"
        first = dict(original(self, layer))
        self.rank = own
        found = dict(original(self, layer))
        self.shapes[name] = (self.config.hidden_size,)
        return iter((found | {name: first[name]}).items())

    around(patch, weights.Layout, "_attention", attention)


@fault(f"{SG}/pull/35535", family="qwen2_moe")
def whole_shared_expert_summed_over_ranks(patch: MonkeyPatch, rank: int) -> None:
    patch.setattr(placement.Placement, "shared_expert", property(lambda self: (0, 1)))


@fault("github.com/vllm-project/tpu-inference/pull/3435", family="qwen2_moe", layout=SPLIT)
def shared_expert_of_a_share_never_summed(patch: MonkeyPatch, rank: int) -> None:
    patch.setattr(placement.Placement, "shared_expert", property(lambda self: self.tensor))


@fault(f"{MS}/pull/100", changes={"vocab_size": 130})
def vocabulary_cut_without_its_rest(patch: MonkeyPatch, rank: int) -> None:
    """Tokens of other shards are looked up modulo the own one instead of being masked."""

    def embed(self: Network, ids: Tensor) -> Tensor:
        rows, own = self.p["model.embed_tokens.weight"], self.layout.vocabulary
        return self.reduced(rows[(ids - own.start) % len(own)]) if self.ranks else rows[ids]

    patch.setattr(Network, "embed", embed)


@fault(f"{MS}/pull/88", seen="drawn tokens differ")
def noise_numbered_within_the_shard(patch: MonkeyPatch, rank: int) -> None:
    """Token 0 of every shard has the same random number."""
    from moe_harness.impls.torch import sampler

    def gumbel(original: Callable, seeds: Tensor, positions: Tensor, count: int, first: int = 0) -> Tensor:
        return original(seeds, positions, count)

    around(patch, sampler, "gumbel", gumbel)


@fault(f"{MS}/pull/98", seen="greedy tokens differ")
def token_numbered_within_the_shard(patch: MonkeyPatch, rank: int) -> None:
    def winner(original: Callable, self: ranks.Ranks, tops: Tensor, scores: Tensor, tokens: Tensor, *rest: Any) -> Any:
        return original(self, tops, scores, tokens % 64, *rest)

    around(patch, ranks.Ranks, "winner", winner)


@fault(f"{SG}/pull/32963")
def attention_reduced_by_nobody(patch: MonkeyPatch, rank: int) -> None:
    calls = count()

    def reduced(original: Callable, self: ranks.Ranks, partial: Tensor) -> Tensor:
        return partial.clone() if next(calls) % 5 == 1 else original(self, partial)

    around(patch, ranks.Ranks, "reduced", reduced)


@fault(f"{V}/pull/28277", layout=EP)
def experts_reduced_twice(patch: MonkeyPatch, rank: int) -> None:
    def twice(original: Callable, self: Any, *given: Any) -> Tensor:
        return self.ranks.reduced(original(self, *given))

    around(patch, expert_layouts.Summed, "__call__", twice)


@fault("github.com/NVIDIA/TensorRT-LLM/pull/13888", layout=SPLIT)
def owners_by_another_division(patch: MonkeyPatch, rank: int) -> None:
    """Tokens go to the rank e % R, weights to the rank e // (E / R)."""
    owner = placement.Placement.owner

    def cyclic(place: placement.Placement, experts: int, dispatcher: str, over: Any) -> Any:
        patch.setattr(placement.Placement, "owner", lambda self, n: [e % self.expert_ranks for e in range(n)])
        try:
            return layout(place, experts, dispatcher, over)
        finally:
            patch.setattr(placement.Placement, "owner", owner)

    layout = expert_layouts.expert_layout
    from moe_harness.impls.qwen3_moe import model

    patch.setattr(model, "expert_layout", cyclic)


@fault(f"{SG}/pull/30895", layout=EP, seen="pad rows read experts")
def pad_rows_into_the_reduction(patch: MonkeyPatch, rank: int) -> None:
    around(patch, Network, "route", lambda original, self, name, x, pads: original(self, name, x, None))
