"""Naive: every rank broadcasts its tokens, every rank runs its experts on all of them, one all_reduce sums.

Bytes per rank: (R-1) T (H s + k (s_w + s_i)) out, 2 (R-1) T H s back.  `dispatch_logits` is the older form that sends
the router's logits and routes again on every rank; it is right only where ties are broken alike everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import gather_counts
from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher


class Naive(Dispatcher):
    """Broadcast and all_reduce; any T_r.

    Args:
        equal_tokens: every rank holds as many tokens as this one, which the caller answers for: nothing is read back
            to the host then, and the layer can be captured in a CUDA graph.
    """

    scheme = "naive"

    @classmethod
    def for_equal(cls, tokens: int) -> dict[str, Any] | None:
        return {"equal_tokens": True}

    def __init__(
        self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor, logical: Tensor | None = None,
        equal_tokens: bool = False,
    ):  # fmt: skip
        super().__init__(group, num_experts=num_experts, owner=owner, logical=logical)
        self.equal_tokens = equal_tokens

    def _counts(self, own: Tensor) -> list[int]:
        if self.equal_tokens:
            return [len(own)] * self.world_size
        return gather_counts(len(own), self.group, own.device)

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> all rows of all ranks."""
        counts = self._counts(hidden_states)
        rows = self._broadcast(hidden_states, counts)
        weights = self._broadcast(topk_weights, counts)
        ids = self._broadcast(self.physical(topk_ids), counts)
        return Dispatched(rows, weights, self.own_ids(ids), counts)

    def dispatch_logits(
        self, hidden_states: Tensor, router_logits: Tensor, route: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Dispatched:
        """As `dispatch`, from logits [T_r, E]; `route` maps logits to (weights, global ids) on every rank."""
        counts = self._counts(hidden_states)
        rows = self._broadcast(hidden_states, counts)
        weights, ids = route(self._broadcast(router_logits, counts))
        return Dispatched(rows, weights, self.own_ids(self.physical(ids)), counts)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        total = expert_output.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
        dist.all_reduce(total, group=self.group)
        return total.split(d.route)[self.rank].clone()

    def _broadcast(self, own: Tensor, counts: list[int]) -> Tensor:
        rows = own.new_empty(sum(counts), *own.shape[1:])
        for source, block in enumerate(rows.split(counts)):
            if source == self.rank:
                block.copy_(own)
            dist.broadcast(block, group=self.group, group_src=source)
        return rows
