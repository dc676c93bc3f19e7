"""allgather_reducescatter: hidden states, weights and ids of all ranks are gathered; a reduce_scatter sums.

Routing is done once, at the source.  Bytes per rank: (R-1) T (H s + k (s_w + s_i)) out, (R-1) T H s back.
"""

from torch import Tensor

from impls.dispatchers.collectives import gather_counts, gather_rows, scatter_sum
from impls.dispatchers.common import Dispatched, Dispatcher


class AllgatherReducescatter(Dispatcher):
    """All rows on all ranks; any T_r."""

    scheme = "allgather_reducescatter"

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> all rows of all ranks."""
        counts = gather_counts(len(hidden_states), self.group, hidden_states.device)
        rows = gather_rows(hidden_states, counts, self.group)
        weights = gather_rows(topk_weights, counts, self.group)
        ids = gather_rows(topk_ids, counts, self.group)
        return Dispatched(rows, weights, self.own_ids(ids), counts)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        return scatter_sum(expert_output, d.route, self.group)
