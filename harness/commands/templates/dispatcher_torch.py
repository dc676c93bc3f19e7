"""The stage `dispatcher`: tokens to the ranks that hold their experts, and the results back; one object per rank.

    dispatch(hidden_states [T_r, H], topk_weights [T_r, k], topk_ids [T_r, k]) -> d
        d.hidden_states [S, H], d.topk_weights [S, k'], d.topk_ids [S, k']: the rows this rank must run, with local ids,
        -1 for a slot that is not its own.  d may carry whatever combine needs.
    combine(expert_output [S, H], d) -> [T_r, H]
        expert_output[s] is the weighted sum over the row's local slots, so combine sums over ranks only.

- owner[e] is the rank that holds expert e; a local id is the place of e among its rank's experts, ascending.
- Ranks may hold different T_r, zero included; a rank may own no expert.  What needs more raises on every rank.
- Any earlier d may be combined, in any order, unless the class declares max_live.

    moe-harness check --stage dispatcher --impl FILE:Dispatcher --ranks 1,2,4
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor


class Dispatcher:
    """Every rank sees all tokens, padded to the longest rank; one all_reduce sums."""

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        mine = (torch.as_tensor(owner) == self.rank).nonzero().flatten()
        self.local = torch.full((num_experts + 1,), -1)  # the last entry is what the id -1 reads
        self.local[mine] = torch.arange(len(mine))

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> SimpleNamespace:
        longest = torch.tensor([len(hidden_states)], device=hidden_states.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.group)
        size = int(longest)
        rows, weights = self._gather(hidden_states, size, 0), self._gather(topk_weights, size, 0)
        ids = self._gather(topk_ids, size, -1)
        local = self.local.to(ids.device)[ids.long()].to(ids.dtype)
        return SimpleNamespace(hidden_states=rows, topk_weights=weights, topk_ids=local, size=size,
                               own=len(hidden_states))  # fmt: skip

    def combine(self, expert_output: Tensor, d: SimpleNamespace) -> Tensor:
        total = expert_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total[self.rank * d.size :][: d.own].clone()

    def _gather(self, own: Tensor, size: int, fill: int) -> Tensor:
        padded = own.new_full((size, *own.shape[1:]), fill)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)
