"""What every scheme needs: who owns which expert under which local id, and the rows a rank received."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Dispatched:
    """The rows this rank must run; `route` is the scheme's own memory of where they came from."""

    hidden_states: Tensor  # [S, H]
    topk_weights: Tensor  # [S, k']
    topk_ids: Tensor  # [S, k'], local ids, -1 for a slot that is not this rank's
    route: Any = None


class Dispatcher:
    """Group, ranks and ownership tables.

    Args:
        group: the torch.distributed process group of the ranks that share the experts.
        num_experts: E.
        owner: int [E], the rank in the group that holds each expert.

    Raises:
        ValueError: `owner` has another length than E or names a rank that does not exist.
    """

    scheme: str

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.num_experts = num_experts
        owner = torch.as_tensor(owner, dtype=torch.int64, device="cpu")
        if owner.shape != (num_experts,):
            raise ValueError(f"owner has shape {list(owner.shape)}, but should have [{num_experts}]")
        if num_experts and not 0 <= int(owner.min()) <= int(owner.max()) < self.world_size:
            raise ValueError(f"owner names ranks {int(owner.min())} to {int(owner.max())} of {self.world_size}")
        self._tables = {torch.device("cpu"): _Tables.of(owner, self.world_size, self.rank)}

    def tables(self, device: torch.device) -> "_Tables":
        """The ownership tables on `device`, copied there once."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def owners(self, topk_ids: Tensor) -> Tensor:
        """The rank that owns each slot's expert, [T, k] int64; -1 where the id is -1."""
        return self.tables(topk_ids.device).owner[topk_ids.long()]

    def owner_ids(self, topk_ids: Tensor) -> Tensor:
        """Each slot's local id on the rank that owns it; -1 where the id is -1."""
        return self.tables(topk_ids.device).local[topk_ids.long()].to(topk_ids.dtype)

    def own_ids(self, topk_ids: Tensor) -> Tensor:
        """Each slot's local id on this rank; -1 where the expert lives elsewhere or the id is -1."""
        return self.tables(topk_ids.device).own[topk_ids.long()].to(topk_ids.dtype)


@dataclass(frozen=True)
class _Tables:
    """[E + 1] each; the last entry is -1 and is what the id -1 reads."""

    owner: Tensor
    local: Tensor  # local id at the owner
    own: Tensor  # local id on this rank, -1 for experts of others

    @classmethod
    def of(cls, owner: Tensor, world_size: int, own_rank: int) -> "_Tables":
        local = torch.empty_like(owner)
        for rank in range(world_size):
            mine = (owner == rank).nonzero().flatten()
            local[mine] = torch.arange(len(mine))
        end = torch.tensor([-1])
        own = local.masked_fill(owner != own_rank, -1)
        return cls(*(torch.cat([table, end]) for table in (owner, local, own)))

    def to(self, device: torch.device) -> "_Tables":
        return _Tables(self.owner.to(device), self.local.to(device), self.own.to(device))
