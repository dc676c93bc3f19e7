"""Attention projections split by head.  A head is never cut: with fewer heads than ranks, ranks repeat them.

num_key_value_heads < tp_size is ordinary under GQA (Qwen3-30B-A3B has 4 of them): each key/value head is then held by
tp_size / num_key_value_heads consecutive ranks, which are the ranks whose query heads use it.
"""

import torch
from torch import Tensor

from moe_harness.impls.parallel.parallel_linear import Linear, share


def local_heads(num_heads: int, rank: int, world_size: int) -> range:
    """The heads that `rank` holds.

    Raises:
        ValueError: the number of heads and of ranks do not divide one another.
    """
    if num_heads >= world_size:
        count = share(num_heads, world_size, "num_heads")
        return range(rank * count, (rank + 1) * count)
    if world_size % num_heads:
        raise ValueError(f"num_heads is {num_heads}, which {world_size} ranks can neither share nor repeat evenly")
    head = rank // (world_size // num_heads)
    return range(head, head + 1)


class HeadParallel(Linear):
    """A dense projection [num_heads * head_dim, in] of which each rank keeps whole heads."""

    output = "sharded"

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_dim: int,
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.heads, self.head_dim = local_heads(num_heads, rank, world_size), head_dim
        super().__init__(
            1, in_features, num_heads * head_dim, rank=rank, world_size=world_size, dtype=dtype, device=device
        )

    def local_out(self) -> int:
        return len(self.heads) * self.head_dim

    def shard(self, weight: Tensor) -> Tensor:
        return weight[self.heads.start * self.head_dim : self.heads.stop * self.head_dim]
