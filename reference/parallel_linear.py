r"""Linear layers sharded over ranks: which part of a checkpoint tensor a rank keeps, and what it then computes.

    column         weight[out, in] split in rows:     y_r = W_r x            [S, out / R], concatenates to y
    merged column  several weights stacked in rows:   each is split by itself, then the parts of a rank are stacked
    row            weight[out, in] split in columns:  y_r = W_r x_r          [S, out], partial: sums to y
    replicated     the whole weight:                  y_r = W x              [S, out], equal on all ranks

Splitting a fused [gate; up] tensor in one piece gives rank 0 the gate and rank 1 the up rows: hence "merged".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("replicated", "column", "merged_column", "row")


def share(size: int, world_size: int, what: str = "size") -> int:
    """size / world_size; ValueError where it leaves a remainder."""
    if size % world_size:
        raise ValueError(f"{what} is {size}, which {world_size} ranks cannot share evenly")
    return size // world_size


def column_shard(weight: Tensor, rank: int, world_size: int) -> Tensor:
    """Rows of `rank` of weight [out, in]: [out / world_size, in]."""
    part = share(weight.shape[0], world_size, "out_features")
    return weight[rank * part : (rank + 1) * part]


def merged_column_shard(weights: Sequence[Tensor], rank: int, world_size: int) -> Tensor:
    """Each weight's own column shard, stacked: for [gate, up] it is [gate_r; up_r]."""
    return torch.cat([column_shard(weight, rank, world_size) for weight in weights])


def row_shard(weight: Tensor, rank: int, world_size: int) -> Tensor:
    """Columns of `rank` of weight [out, in]: [out, in / world_size]."""
    part = share(weight.shape[1], world_size, "in_features")
    return weight[:, rank * part : (rank + 1) * part]


def head_shard(weight: Tensor, num_heads: int, rank: int, world_size: int) -> Tensor:
    """Rows of the heads of `rank` of weight [num_heads * head_dim, in].

    With fewer heads than ranks (GQA: num_key_value_heads < tp_size) each head is held by world_size / num_heads
    consecutive ranks; a head is never cut.

    Raises:
        ValueError: neither number divides the other.
    """
    head_dim = share(weight.shape[0], num_heads, "out_features")
    if num_heads >= world_size:
        return column_shard(weight.view(num_heads, head_dim, -1), rank, world_size).flatten(0, 1)
    if world_size % num_heads:
        raise ValueError(f"num_heads is {num_heads}, which {world_size} ranks can neither share nor repeat evenly")
    head = rank // (world_size // num_heads)
    return weight[head * head_dim : (head + 1) * head_dim]


def input_shard(x: Tensor, rank: int, world_size: int) -> Tensor:
    """Columns of `rank` of x [S, in]: what a row-parallel layer takes."""
    part = share(x.shape[-1], world_size, "in_features")
    return x[..., rank * part : (rank + 1) * part]
