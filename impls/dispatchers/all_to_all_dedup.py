"""all_to_all, deduplicated: a token travels once to each rank that owns any of its experts.

Bytes per rank: T U (H s + k (s_w + s_i)) out, T U H s back, U the mean number of other ranks a token needs.  Ids are
made local at the source, slots of other ranks become -1, the weights travel; the owner sums its slots with weights,
the source sums over ranks without.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import exchange_counts, exchange_rows, grouped
from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher


@dataclass(frozen=True)
class Route:
    """Which token each sent row was and its place among the token's rows; rows to and from each rank."""

    tokens: Tensor
    places: Tensor
    sent: list[int]
    received: list[int]
    shape: tuple[int, int]  # T, most rows any token has


class AllToAllDedup(Dispatcher):
    """One row per (token, destination rank); any T_r."""

    scheme = "all_to_all_dedup"

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> each token once, k' = k."""
        topk_ids = self.physical(topk_ids)
        owners = self.owners(topk_ids)
        ranks = torch.arange(self.world_size, device=owners.device)
        needed = (owners[:, :, None] == ranks).any(1)  # [T, R]
        counts, copies = grouped(torch.where(needed, ranks, -1).flatten(), self.world_size)
        sent, received = exchange_counts(counts, self.group)
        copies = copies[: sum(sent)]
        tokens, targets = copies // self.world_size, copies % self.world_size
        places = (needed.cumsum(1) - 1)[tokens, targets]
        shape = (len(hidden_states), min(self.world_size, topk_ids.shape[1]))
        route = Route(tokens, places, sent, received, shape)
        foreign = owners[tokens] != targets[:, None]
        return Dispatched(
            self._exchange(hidden_states[tokens], route),
            self._exchange(topk_weights[tokens], route),
            self._exchange(self.owner_ids(topk_ids)[tokens].masked_fill(foreign, -1), route),
            route,
        )

    def _exchange(self, rows: Tensor, route: Route) -> Tensor:
        return exchange_rows(rows, route.sent, route.received, self.group)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        route: Route = d.route
        rows = exchange_rows(expert_output, route.received, route.sent, self.group)
        parts = rows.new_zeros(*route.shape, rows.shape[-1])
        parts[route.tokens, route.places] = rows
        return parts.sum(1)
