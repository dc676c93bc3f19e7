"""A sparse layer over ranks: who runs which expert for which token, and the one reduction behind it.

    Alone       one rank: routed + shared
    Summed      all tokens on all ranks, each with its part of the experts and of the shared expert; one all_reduce
    Exchanged   each rank routes its share of the tokens, a dispatcher moves them to their experts and back; the shared
                expert, whole on every rank, is added to own tokens, and the shares are gathered

A dispatcher's combine is the reduction of its scheme; where experts are cut in columns too, `columns` sums those.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.parallel.reduction import COMPLETE, PARTIAL, reduction
from moe_harness.impls.qwen3_moe.placement import Placement
from moe_harness.impls.qwen3_moe.ranks import Ranks, Unsummed, share

REGISTRY = "moe_harness.impls.dispatchers.dispatcher"
REPLICATED = "local_allreduce"  # the scheme that needs the same tokens on all ranks


class Block(Protocol):
    """What a layer offers: its router, the experts of this rank and its part of the shared expert."""

    def route(self, name: str, x: Tensor, pads: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def routed(self, name: str, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor: ...

    def shared(self, name: str, x: Tensor) -> Tensor | None: ...

    def reduced(self, partial: Tensor) -> Tensor | Unsummed: ...


ExpertLayout = Callable[[Block, str, Tensor, Tensor | None], Tensor | Unsummed]


def alone(block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor:
    """x [T, H] -> [T, H] with every expert here; `pads` int [T] is negative in pad rows, which read no expert."""
    return _sum(block.routed(name, x, *block.route(name, x, pads)), block.shared(name, x))


class Summed:
    """The same tokens everywhere.

    Args:
        dispatcher: of whole experts over all ranks; None where experts are cut in columns, over all ranks or beside.
        local: int64 [E + 1], this rank's number of each expert, -1 elsewhere; None where all are here.
    """

    def __init__(self, ranks: Ranks, dispatcher: Any = None, local: Tensor | None = None):
        self.ranks, self.dispatcher, self.local = ranks, dispatcher, local

    def __call__(self, block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor | Unsummed:
        weights, ids = block.route(name, x, pads)
        if self.dispatcher is None:
            ids = ids if self.local is None else self.local[ids.long()].to(ids.dtype)
            return block.reduced(_sum(block.routed(name, x, weights, ids), block.shared(name, x)))
        d = self.dispatcher.dispatch(x, weights, ids)
        # Rows are the tokens themselves, so that the shared expert's part goes into the same sum.
        out = _sum(block.routed(name, d.hidden_states, d.topk_weights, d.topk_ids), block.shared(name, x))
        return block.reduced(out) if self.ranks.sums_in_the_norm(out) else self.dispatcher.combine(out, d)


class Exchanged:
    """Each rank's own tokens, through a dispatcher.

    Args:
        place: with `split_tokens`, tokens are the same everywhere and each expert rank takes its share of them; without
            it they are the rank's own already.
        columns: the group over which experts are cut in columns; None: they are not.
        over: the ranks of the dispatcher.
    """

    def __init__(self, place: Placement, dispatcher: Any, over: Ranks, columns: dist.ProcessGroup | None = None):
        self.place, self.dispatcher, self.over, self.columns = place, dispatcher, over, columns

    def __call__(self, block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor:
        if self.place.data_parallel:
            return self._own(block, name, x, pads)
        counts = share(len(x), self.over.size)
        first = sum(counts[: self.over.rank])
        here = slice(first, first + counts[self.over.rank])
        own = self._own(block, name, x[here], None if pads is None else pads[here])
        return self.over.rows(own, counts)

    def _own(self, block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor:
        d = self.dispatcher.dispatch(x, *block.route(name, x, pads))
        routed = self.dispatcher.combine(block.routed(name, d.hidden_states, d.topk_weights, d.topk_ids), d)
        state = COMPLETE if self.columns is None else PARTIAL
        return reduction(routed, block.shared(name, x), self.columns, routed_state=state, shared_state=COMPLETE)


def _sum(routed: Tensor, shared: Tensor | None) -> Tensor:
    return routed if shared is None else routed + shared


def dispatcher_class(name: str) -> Any:
    """The class behind a registered name, `dispatchers:` before it or not.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    module = import_module(REGISTRY)
    plain = name.removeprefix("dispatchers:")
    if plain not in module.__all__:
        raise ValueError(f"dispatcher is {name!r}, wanted one of {', '.join(module.__all__)}")
    return getattr(module, plain)


def splits_tokens(name: str, place: dict[str, Any]) -> bool:
    """Whether ranks with the same tokens share them out before this dispatcher moves them."""
    needs_all = getattr(dispatcher_class(name), "requires_replicated_tokens", False)
    if needs_all and place.get("data_parallel"):
        raise ValueError(f"{name} needs the same tokens on every rank, wanted another dispatcher with data_parallel")
    return not needs_all and not place.get("data_parallel", False)


def expert_layout(place: Placement, num_experts: int, dispatcher: str, ranks: Ranks | None) -> ExpertLayout:
    """How this rank runs sparse layers.  A collective: process groups are made where experts are cut both ways.

    Raises:
        ValueError: a dispatcher that does not exist, or that cannot do what `place` asks for.
    """
    if ranks is None or not num_experts:
        return alone
    if not place.expert_parallel:
        return Summed(ranks)
    kind = dispatcher_class(dispatcher)
    owner = torch.tensor(place.owner(num_experts))
    given: dict[str, Any] = {"num_experts": num_experts, "owner": owner}
    if place.copies:
        if not getattr(kind, "supports_copies", False):
            raise ValueError(f"{dispatcher} has no redundant experts, wanted copies=0 or another dispatcher")
        given["logical"] = torch.tensor(place.logical(num_experts))
    replicated = getattr(kind, "requires_replicated_tokens", False)
    if replicated and place.expert_shards > 1:
        return Summed(ranks, local=_local_numbers(place, num_experts).to(ranks.device))
    if replicated:  # the engine answers for equal tokens: they come out of the reduction before
        return Summed(ranks, kind(ranks.group, **given, verify=False))
    over, columns = _grid(place, ranks)
    return Exchanged(place, kind(over.group, **given), over, columns)


def _local_numbers(place: Placement, num_experts: int) -> Tensor:
    if place.copies:
        raise ValueError("copies with expert_shards and local_allreduce would only repeat work, wanted copies=0")
    table = torch.full((num_experts + 1,), -1)  # the last entry is what the id -1 reads
    held = place.held(num_experts)
    table[held] = torch.arange(len(held))
    return table


def _grid(place: Placement, ranks: Ranks) -> tuple[Ranks, dist.ProcessGroup | None]:
    """The ranks with the same columns of other experts, and the group with other columns of the same experts."""
    if place.expert_shards == 1:
        return ranks, None
    world = dist.get_process_group_ranks(ranks.group)
    part = place.rank % place.expert_shards
    rows = [world[r] for r in range(len(world)) if r % place.expert_shards == part]
    columns = [world[r] for r in range(len(world)) if r // place.expert_shards == place.expert_rank]
    over, across = (dist.new_group(own, use_local_synchronization=True) for own in (rows, columns))
    return Ranks(over, ranks.device), across
