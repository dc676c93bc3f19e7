"""Masked, the low-latency form: shapes depend on a bound of tokens only, so nothing is read back to the host.

Every rank sends each other rank max_tokens * k slots, used or not.  A received copy goes to the next free row of its
expert in [E_local, max_tokens * R, H]; rows beyond an expert's count are garbage, marked by the id -1.  The bound costs
bytes: it is for small batches, where the time of a call counts and not its size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher


@dataclass(frozen=True)
class Route:
    """Where each copy went: places [T, k] in the send buffer, -1 for none; rows [R * C] in the expert buffer."""

    places: Tensor
    rows: Tensor


class Masked(Dispatcher):
    """Fixed-size exchange.

    Args:
        max_tokens: bound of T_r on every rank; None lets the ranks agree on one per call, which costs a host read.

    Raises:
        ValueError: on every rank, where a rank holds more than max_tokens tokens.
    """

    scheme = "masked"

    @classmethod
    def for_equal(cls, tokens: int) -> dict[str, Any] | None:
        return {"max_tokens": tokens}

    def __init__(
        self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor, logical: Tensor | None = None,
        max_tokens: int | None = None,
    ):  # fmt: skip
        super().__init__(group, num_experts=num_experts, owner=owner, logical=logical)
        self.max_tokens = max_tokens
        self.num_local = int((self.tables(torch.device("cpu")).owner[:-1] == self.rank).sum())

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> [E_local * max_tokens * R, H], k' = 1."""
        bound = self._bound(hidden_states)
        weights, ids = merge_duplicates(topk_weights, self.physical(topk_ids))
        places = self._places(ids, bound * topk_ids.shape[1])
        size = self.world_size * bound * topk_ids.shape[1]
        received_ids = self._exchange(_placed(self.owner_ids(ids)[..., None], places, size, fill=-1))
        received_weights = self._exchange(_placed(weights[..., None], places, size))
        copies = hidden_states[:, None].expand(-1, topk_ids.shape[1], -1)
        received = self._exchange(_placed(copies, places, size))
        rows, total = self._expert_rows(received_ids[:, 0], bound)
        return Dispatched(
            _placed(received, rows, total),
            _placed(received_weights, rows, total),
            _placed(received_ids, rows, total, fill=-1),
            Route(places, rows),
        )

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        returned = self._exchange(_taken(expert_output, d.route.rows))
        return _taken(returned, d.route.places).sum(1)

    def _bound(self, hidden_states: Tensor) -> int:
        if self.max_tokens is None or not hidden_states.is_cuda:
            bound = torch.tensor([len(hidden_states)], device=hidden_states.device)
            dist.all_reduce(bound, op=dist.ReduceOp.MAX, group=self.group)
            needed = int(bound)
        else:
            needed = len(hidden_states)  # a rank above its own bound can only tell itself
        if self.max_tokens is not None and needed > self.max_tokens:
            raise ValueError(f"a rank holds {needed} tokens, but max_tokens is {self.max_tokens}")
        return needed if self.max_tokens is None else self.max_tokens

    def _places(self, ids: Tensor, per_rank: int) -> Tensor:
        """Each copy's place in the send buffer [R * per_rank], [T, k]; -1 where the id is -1."""
        owners = self.owners(ids).flatten()
        among = running_count(owners)
        return torch.where(owners < 0, -1, owners * per_rank + among).view(ids.shape)

    def _expert_rows(self, ids: Tensor, bound: int) -> tuple[Tensor, int]:
        """Row of each received copy in the expert buffer, -1 for unused slots; and the buffer's length."""
        per_expert = bound * self.world_size
        among = running_count(ids)
        return torch.where(ids < 0, -1, ids * per_expert + among), self.num_local * per_expert

    def _exchange(self, buffer: Tensor) -> Tensor:
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=self.group)
        return received


def merge_duplicates(topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same expert twice in a row becomes one slot with the sum of the weights, so that counts stay bounded."""
    same = (topk_ids[:, :, None] == topk_ids[:, None, :]) & (topk_ids >= 0)[:, :, None]
    first = same.int().argmax(2)  # the first slot that names this slot's expert
    slots = torch.arange(topk_ids.shape[1], device=topk_ids.device)
    keep = (topk_ids >= 0) & (first == slots)
    # Masked slots may carry NaN weights, so they are taken out before anything is added.
    summed = torch.where(same, topk_weights[:, None, :], 0).sum(2)
    return summed.to(topk_weights.dtype), topk_ids.masked_fill(~keep, -1)


def running_count(kinds: Tensor) -> Tensor:
    """For each element of kinds [n], how many of the same kind stand before it."""
    ordered, order = kinds.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)  # where the element's kind begins
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(kinds), device=kinds.device) - first)


def _placed(values: Tensor, places: Tensor, size: int, fill: float | None = None) -> Tensor:
    """A buffer [size, ...] with values[i] at places[i]; -1 is dropped.  Without `fill` the rest is garbage."""
    width = values.shape[-1]
    shape = (size + 1, width)  # the row behind the end takes what is dropped
    buffer = values.new_empty(shape) if fill is None else values.new_full(shape, fill)
    buffer[torch.where(places < 0, size, places).flatten()] = values.reshape(-1, width)
    return buffer[:size]


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """values[places[i]], zero where that is -1; [*places.shape, H]."""
    if not len(values):
        return values.new_zeros(*places.shape, values.shape[-1])
    return values[places.clamp(min=0)].masked_fill_((places < 0)[..., None], 0)
