"""allgather_reducescatter: hidden states, weights and ids of all ranks are gathered; a reduce_scatter sums.

Routing is done once, at the source.  Bytes per rank: (R-1) T (H s + k (s_w + s_i)) out, (R-1) T H s back.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import gather_counts, gather_rows, scatter_sum
from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher


class AllgatherReducescatter(Dispatcher):
    """All rows on all ranks; any T_r.

    Args:
        equal_tokens: every rank holds as many tokens as this one, which the caller answers for: nothing is read back
            to the host then, and the layer can be captured in a CUDA graph.
    """

    scheme = "allgather_reducescatter"

    @classmethod
    def for_equal(cls, tokens: int) -> dict[str, Any] | None:
        return {"equal_tokens": True}

    def __init__(
        self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor, logical: Tensor | None = None,
        equal_tokens: bool = False,
    ):  # fmt: skip
        super().__init__(group, num_experts=num_experts, owner=owner, logical=logical)
        self.equal_tokens = equal_tokens

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> all rows of all ranks."""
        tokens = len(hidden_states)
        known = [tokens] * self.world_size if self.equal_tokens else None
        counts = known or gather_counts(tokens, self.group, hidden_states.device)
        rows = gather_rows(hidden_states, counts, self.group)
        weights = gather_rows(topk_weights, counts, self.group)
        ids = gather_rows(self.physical(topk_ids), counts, self.group)
        return Dispatched(rows, weights, self.own_ids(ids), counts)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        return scatter_sum(expert_output, d.route, self.group)
