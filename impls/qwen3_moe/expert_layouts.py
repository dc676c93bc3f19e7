"""A sparse layer over ranks: who runs which expert for which token, and the one reduction behind it.

    Alone       one rank: routed + shared
    Summed      all tokens on all ranks, each with its part of the experts and of the shared expert; one all_reduce
    Exchanged   each rank routes its share of the tokens, a dispatcher moves them to their experts and back; the shared
                expert, whole on every rank, is added to own tokens, and the shares are gathered

A dispatcher's combine is the reduction of its scheme; where experts are cut in columns too, `columns` sums those.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.parallel.reduction import COMPLETE, PARTIAL, reduction
from moe_harness.impls.qwen3_moe.outputs import Unsummed
from moe_harness.impls.qwen3_moe.placement import Placement
from moe_harness.impls.qwen3_moe.ranks import Ranks, share

REGISTRY = "moe_harness.impls.dispatchers.dispatcher"


class Block(Protocol):
    """What a layer offers: its router, the experts of this rank and its part of the shared expert."""

    def route(self, name: str, x: Tensor, pads: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def routed(self, name: str, x: Tensor, weights: Tensor, ids: Tensor, local: Tensor | None = None) -> Tensor: ...

    def shared(self, name: str, x: Tensor) -> Tensor | None: ...

    def reduced(self, partial: Tensor) -> Tensor | Unsummed: ...


ExpertLayout = Callable[[Block, str, Tensor, Tensor | None], Tensor | Unsummed]


def alone(block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor:
    """x [T, H] -> [T, H] with every expert here; `pads` int [T] is negative in pad rows, which read no expert."""
    return _sum(block.routed(name, x, *block.route(name, x, pads)), block.shared(name, x))


alone.capturable = True


class Summed:
    """The same tokens everywhere.

    Args:
        dispatcher: of redundant experts over all ranks; None where every expert has one place.
        local: int64 [E], this rank's number of each expert, -1 elsewhere; None where all are here.
    """

    capturable = True

    def __init__(self, ranks: Ranks, dispatcher: Any = None, local: Tensor | None = None):
        self.ranks, self.dispatcher, self.local = ranks, dispatcher, local

    def __call__(self, block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor | Unsummed:
        weights, ids = block.route(name, x, pads)
        if self.dispatcher is None:
            return block.reduced(_sum(block.routed(name, x, weights, ids, self.local), block.shared(name, x)))
        d = self.dispatcher.dispatch(x, weights, ids)
        # Rows are the tokens themselves, so that the shared expert's part goes into the same sum.
        out = _sum(block.routed(name, d.hidden_states, d.topk_weights, d.topk_ids), block.shared(name, x))
        later = self.ranks.sums_in_the_norm(out.shape, out.dtype)
        return block.reduced(out) if later else self.dispatcher.combine(out, d)


class Exchanged:
    """Each rank's own tokens, through a dispatcher.

    Args:
        place: with `split_tokens`, tokens are the same everywhere and each expert rank takes its share of them; without
            it they are the rank's own already.
        columns: the group over which experts are cut in columns; None: they are not.
        over: the ranks of the dispatcher.
        equal: gives the dispatcher for steps in which every rank has so many tokens, which reads nothing back to the
            host; None where the scheme has none, or ranks have tokens of their own.
    """

    def __init__(
        self, place: Placement, dispatcher: Any, over: Ranks, columns: dist.ProcessGroup | None = None,
        equal: Callable[[int], Any] | None = None,
    ):  # fmt: skip
        self.place, self.dispatcher, self.over, self.columns = place, dispatcher, over, columns
        self.equal = None if place.data_parallel else equal

    @property
    def capturable(self) -> bool:
        """Whether a step with pad rows can be part of a CUDA graph."""
        return self.equal is not None

    def __call__(self, block: Block, name: str, x: Tensor, pads: Tensor | None) -> Tensor:
        if self.place.data_parallel:
            return self._own(block, name, x, pads, self.dispatcher)
        if pads is not None and self.equal is not None:
            return self._shared_out(block, name, x, pads, self.equal)
        counts = share(len(x), self.over.size)
        first = sum(counts[: self.over.rank])
        here = slice(first, first + counts[self.over.rank])
        own = self._own(block, name, x[here], None if pads is None else pads[here], self.dispatcher)
        return self.over.rows(own, counts)

    def _shared_out(
        self, block: Block, name: str, x: Tensor, pads: Tensor, equal: Callable[[int], Any]
    ) -> Tensor:  # fmt: skip
        """Equal shares of the tokens, with pad rows behind the last where they do not divide."""
        each = -(-len(x) // self.over.size)
        missing = each * self.over.size - len(x)
        if missing:
            x, pads = F.pad(x, (0, 0, 0, missing)), F.pad(pads, (0, missing), value=-1)
        here = slice(each * self.over.rank, each * (self.over.rank + 1))
        own = self._own(block, name, x[here], pads[here], equal(each))
        return self.over.rows(own, [each] * self.over.size)[: len(x) - missing]

    def _own(self, block: Block, name: str, x: Tensor, pads: Tensor | None, dispatcher: Any) -> Tensor:
        d = dispatcher.dispatch(x, *block.route(name, x, pads))
        routed = dispatcher.combine(block.routed(name, d.hidden_states, d.topk_weights, d.topk_ids), d)
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
    if getattr(kind, "requires_replicated_tokens", False):
        # The engine answers for equal tokens, they come out of the reduction before: nothing has to be dispatched.
        if not place.copies:
            return Summed(ranks, local=_local_numbers(place, num_experts).to(ranks.device))
        if place.expert_shards > 1:
            raise ValueError("copies with expert_shards and local_allreduce would only repeat work, wanted copies=0")
        return Summed(ranks, kind(ranks.group, **given, verify=False))
    over, columns = _grid(place, ranks)

    def make(**options: Any) -> Any:
        return kind(over.group, **given, **options)

    equal = None if kind.for_equal(1) is None else cache(lambda tokens: make(**kind.for_equal(tokens)))
    return Exchanged(place, make(), over, columns, equal)


def _local_numbers(place: Placement, num_experts: int) -> Tensor:
    table = torch.full((num_experts,), -1)
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
