"""all_to_all per copy: every (token, slot) travels to the owner of its expert, and its result travels back.

Bytes per rank: k T (1 - 1/R) H s each way when routing is even, plus one weight and one id per copy.  The results of
a token's slots meet in [T, k, H] and are summed there in one go: no atomics, the same bits in every run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from impls.dispatchers.collectives import exchange_counts, exchange_rows
from impls.dispatchers.common import Dispatched, Dispatcher


@dataclass(frozen=True)
class Route:
    """Which (token, slot) each sent row was, and how many rows went to and came from each rank."""

    tokens: Tensor
    slots: Tensor
    sent: list[int]
    received: list[int]
    shape: tuple[int, int]  # T, k


class AllToAll(Dispatcher):
    """One row per (token, slot); any T_r."""

    scheme = "all_to_all"

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> copies for own experts, k' = 1."""
        owners = self.owners(topk_ids)
        tokens, slots = (owners >= 0).nonzero(as_tuple=True)
        order = owners[tokens, slots].argsort(stable=True)
        tokens, slots = tokens[order], slots[order]
        counts = torch.bincount(owners[tokens, slots], minlength=self.world_size)
        route = Route(tokens, slots, counts.tolist(), exchange_counts(counts, self.group), tuple(topk_ids.shape))
        ids = self.owner_ids(topk_ids)
        return Dispatched(
            self._exchange(hidden_states[tokens], route),
            self._exchange(topk_weights[tokens, slots, None], route),
            self._exchange(ids[tokens, slots, None], route),
            route,
        )

    def _exchange(self, rows: Tensor, route: Route) -> Tensor:
        return exchange_rows(rows, route.sent, route.received, self.group)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        route: Route = d.route
        rows = exchange_rows(expert_output, route.received, route.sent, self.group)
        slots = rows.new_zeros(*route.shape, rows.shape[-1])
        slots[route.tokens, route.slots] = rows
        return slots.sum(1)
