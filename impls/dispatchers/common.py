"""What every scheme needs: who owns which expert under which local id, and the rows a rank received."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_TURNS = 64  # after so many tokens the copies of an expert are taken in turn from the first again


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
        owner: int [P], the rank in the group that holds each physical expert; P = E without `logical`.
        logical: int [P], the expert that each physical one is a copy of (redundant experts); None: there are no copies.

    Raises:
        ValueError: `owner` has another length than P or names a rank that does not exist, or an expert has no copy.
    """

    scheme: str
    supports_copies = True

    @classmethod
    def for_equal(cls, tokens: int) -> dict[str, Any] | None:
        """Arguments with which calls of `tokens` tokens on every rank read nothing back to the host, as CUDA graphs
        need it; None where there are none."""
        return None

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor, logical: Tensor | None = None):
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        owner = torch.as_tensor(owner, dtype=torch.int64, device="cpu")
        self._copies = None if logical is None else _copies(logical, num_experts)
        wanted = num_experts if logical is None else len(logical)
        if owner.shape != (wanted,):
            raise ValueError(f"owner has shape {list(owner.shape)}, but should have [{wanted}]")
        self.num_experts = wanted  # from here on an expert is a physical one
        if wanted and not 0 <= int(owner.min()) <= int(owner.max()) < self.world_size:
            raise ValueError(f"owner names ranks {int(owner.min())} to {int(owner.max())} of {self.world_size}")
        self._tables = {torch.device("cpu"): _Tables.of(owner, self.world_size, self.rank)}

    def tables(self, device: torch.device) -> "_Tables":
        """The ownership tables on `device`, copied there once."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def physical(self, topk_ids: Tensor) -> Tensor:
        """The copy that each slot goes to: tokens take the copies of an expert in turn.  Equal on all ranks for equal
        tokens; -1 stays -1."""
        if self._copies is None:
            return topk_ids
        table = self._copies = self._copies.to(topk_ids.device)
        turn = torch.arange(len(topk_ids), device=topk_ids.device)[:, None] % table.shape[1]
        return table[topk_ids.long(), turn].to(topk_ids.dtype)

    def owners(self, topk_ids: Tensor) -> Tensor:
        """The rank that owns each slot's expert, [T, k] int64; -1 where the id is -1."""
        return self.tables(topk_ids.device).owner[topk_ids.long()]

    def owner_ids(self, topk_ids: Tensor) -> Tensor:
        """Each slot's local id on the rank that owns it; -1 where the id is -1."""
        return self.tables(topk_ids.device).local[topk_ids.long()].to(topk_ids.dtype)

    def own_ids(self, topk_ids: Tensor) -> Tensor:
        """Each slot's local id on this rank; -1 where the expert lives elsewhere or the id is -1."""
        return self.tables(topk_ids.device).own[topk_ids.long()].to(topk_ids.dtype)


def _copies(logical: Tensor, num_experts: int) -> Tensor:
    """[E + 1, n]: the physical experts that hold each expert, repeated to equal length; the last row is what -1 reads.

    Raises:
        ValueError: an expert without a copy, or a copy of none.
    """
    logical = torch.as_tensor(logical, dtype=torch.int64, device="cpu")
    held = [(logical == expert).nonzero().flatten().tolist() for expert in range(num_experts)]
    if not all(held) or sum(map(len, held)) != len(logical):
        raise ValueError(f"logical is {logical.tolist()}, but should hold each of 0..{num_experts - 1} once or more")
    turns = min(math.lcm(*(len(copies) for copies in held)), MOST_TURNS)
    rows = [[copies[i % len(copies)] for i in range(turns)] for copies in held]
    return torch.tensor([*rows, [-1] * turns])


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
