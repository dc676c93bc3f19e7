"""all_to_all per copy: every (token, slot) travels to the owner of its expert, and its result travels back.

Bytes per rank: k T (1 - 1/R) H s each way when routing is even, plus one weight and one id per copy.  The results of
a token's slots meet in [T, k, H] and are summed there in one go: no atomics, the same bits in every run.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_harness.impls.dispatchers.collectives import exchange_counts, exchange_rows, grouped
from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher


@dataclass(frozen=True)
class Route:
    """Which copy (token * k + slot) each sent row was, and how many rows went to and came from each rank."""

    copies: Tensor
    sent: list[int]
    received: list[int]
    shape: tuple[int, int]  # T, k


class AllToAll(Dispatcher):
    """One row per (token, slot); any T_r."""

    scheme = "all_to_all"

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> copies for own experts, k' = 1."""
        topk_ids = self.physical(topk_ids)
        counts, copies = grouped(self.owners(topk_ids).flatten(), self.world_size)
        sent, received = exchange_counts(counts, self.group)
        copies = copies[: sum(sent)]
        route = Route(copies, sent, received, (topk_ids.shape[0], topk_ids.shape[1]))
        tokens = copies // max(topk_ids.shape[1], 1)
        return Dispatched(
            self._exchange(hidden_states[tokens], route),
            self._exchange(topk_weights.reshape(-1, 1)[copies], route),
            self._exchange(self.owner_ids(topk_ids).reshape(-1, 1)[copies], route),
            route,
        )

    def _exchange(self, rows: Tensor, route: Route) -> Tensor:
        return exchange_rows(rows, route.sent, route.received, self.group)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        route: Route = d.route
        rows = exchange_rows(expert_output, route.received, route.sent, self.group)
        slots = rows.new_zeros(route.shape[0] * route.shape[1], rows.shape[-1])
        slots[route.copies] = rows
        return slots.view(*route.shape, rows.shape[-1]).sum(1)
