"""Grouped linear layers of one rank: what it keeps of each expert's checkpoint tensor, and its part of the product.

    Replicated            the whole weight [out, in]                y = W x
    ColumnParallel        rows of the weight                        y_r = W_r x        columns of y
    MergedColumnParallel  rows of each of several weights, stacked  [g_r; u_r]         for gate and up
    RowParallel           columns of the weight                     y_r = W_r x_r      partial: the ranks' sum is y

A router is Replicated, never RowParallel.  Rank and world size are arguments: nothing here knows a process group.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Replicated", "ColumnParallel", "MergedColumnParallel", "RowParallel"]


def share(size: int, world_size: int, what: str) -> int:
    """size / world_size; ValueError where it leaves a remainder."""
    if size % world_size:
        raise ValueError(f"{what} is {size}, which {world_size} ranks cannot share evenly")
    return size // world_size


class Linear:
    """What all kinds share: local weights [E, out_local, in_local], strict loading, the grouped product.

    Args:
        num_experts: E; 1 for a dense layer.
        rank, world_size: this rank's place among those that share the layer.

    Raises:
        ValueError: a size that world_size does not divide.
    """

    output = "replicated"  # what the results of all ranks are together

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.rank, self.world_size = rank, world_size
        self.in_features, self.out_features = in_features, out_features
        shape = (num_experts, self.local_out(), self.local_in())
        self.weight = torch.empty(shape, dtype=dtype, device=device)
        self.loaded: set[tuple[int, int | None]] = set()

    def local_in(self) -> int:
        return self.in_features

    def local_out(self) -> int:
        return self.out_features

    def shard(self, weight: Tensor) -> Tensor:
        """This rank's part of a checkpoint tensor [out, in]."""
        return weight

    def load(self, expert_id: int, weight: Tensor, shard_id: int | None = None) -> None:
        """Keep this rank's part of expert `expert_id`'s checkpoint tensor [out, in].

        Raises:
            ValueError: no such expert, another shape, or a shard_id where the layer is not merged.
        """
        if shard_id is not None:
            raise ValueError(f"shard_id is {shard_id}, but {type(self).__name__} holds one weight per expert")
        self._check(expert_id, weight, (self.out_features, self.in_features))
        self.weight[expert_id].copy_(self.shard(weight))
        self.loaded.add((expert_id, None))

    def _check(self, expert_id: int, weight: Tensor, shape: tuple[int, int]) -> None:
        if not 0 <= expert_id < len(self.weight):
            raise ValueError(f"expert_id is {expert_id}, but should be in 0..{len(self.weight) - 1}")
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight of expert {expert_id} is {list(weight.shape)}, but should be {list(shape)}")

    def missing(self) -> list[tuple[int, int | None]]:
        """(expert_id, shard_id) of what has not been loaded yet."""
        return [(expert, None) for expert in range(len(self.weight)) if (expert, None) not in self.loaded]

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        """x [S, in_local], rows sorted by expert, group_sizes int [E] -> [S, out_local] in the dtype of x.

        Raises:
            RuntimeError: a weight has not been loaded.
        """
        if missing := self.missing():
            raise RuntimeError(f"weights not loaded, as (expert_id, shard_id): {missing[:8]}")
        out = x.new_empty(len(x), self.weight.shape[1])
        start = 0
        for weight, size in zip(self.weight, group_sizes.tolist(), strict=True):
            torch.matmul(x[start : start + size], weight.to(x.dtype).T, out=out[start : start + size])
            start += size
        return out


class Replicated(Linear):
    """The whole weight on every rank."""


class ColumnParallel(Linear):
    """Rows of the weight; takes the whole x, returns this rank's columns of y."""

    output = "sharded"

    def local_out(self) -> int:
        return share(self.out_features, self.world_size, "out_features")

    def shard(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.world_size)[self.rank]


class RowParallel(Linear):
    """Columns of the weight; takes this rank's columns of x, returns a partial sum that nobody has reduced yet."""

    output = "partial"

    def local_in(self) -> int:
        return share(self.in_features, self.world_size, "in_features")

    def shard(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.world_size, dim=1)[self.rank]


class MergedColumnParallel(Linear):
    """Several weights [out_i, in] behind one product; each is split by itself, so rank r computes [g_r; u_r]."""

    output = "sharded"

    def __init__(self, num_experts: int, in_features: int, out_features: Sequence[int], **place: Any):
        self.parts = list(out_features)
        self.local_parts = [share(size, place["world_size"], "out_features") for size in self.parts]
        super().__init__(num_experts, in_features, sum(self.parts), **place)

    def local_out(self) -> int:
        return sum(self.local_parts)

    def load(self, expert_id: int, weight: Tensor, shard_id: int | None = None) -> None:
        """Keep this rank's part of weight number `shard_id`, or of all of them where they come stacked (None)."""
        if shard_id is None:
            self._check(expert_id, weight, (self.out_features, self.in_features))
            for number, part in enumerate(weight.split(self.parts)):
                self.load(expert_id, part, number)
            return
        if not 0 <= shard_id < len(self.parts):
            raise ValueError(f"shard_id is {shard_id}, but should be in 0..{len(self.parts) - 1}")
        self._check(expert_id, weight, (self.parts[shard_id], self.in_features))
        rows = self.weight[expert_id].split(self.local_parts)[shard_id]
        rows.copy_(weight.chunk(self.world_size)[self.rank])
        self.loaded.add((expert_id, shard_id))

    def missing(self) -> list[tuple[int, int | None]]:
        wanted = [(expert, part) for expert in range(len(self.weight)) for part in range(len(self.parts))]
        return [pair for pair in wanted if pair not in self.loaded]
