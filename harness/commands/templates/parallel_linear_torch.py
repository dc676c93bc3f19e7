"""The stage `parallel_linear`: grouped linear layers of which each rank keeps a part; one object per rank.

    Linear(num_experts, in_features, out_features, *, rank, world_size, dtype, device)
    load(expert_id, weight [out, in], shard_id=None)     the checkpoint's own tensor; keep this rank's part
    linear(x [S, in or in / world_size], group_sizes int [E]) -> [S, out or out / world_size]

- `output` says what the ranks' results are together: "replicated", "sharded" (columns) or "partial" (their sum counts).
- Sizes that the ranks cannot share: raise ValueError on every rank.

    moe-harness check --stage parallel_linear --impl FILE:ColumnParallel --impl FILE:RowParallel
"""

import torch
from torch import Tensor


class ColumnParallel:
    """Each rank keeps rows of every weight and computes columns of the result."""

    output = "sharded"
    dim = 0  # of the weight that is shared among the ranks

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, rank: int, world_size: int,
                 dtype: torch.dtype, device: torch.device | str):  # fmt: skip
        shape = [out_features, in_features]
        if shape[self.dim] % world_size:
            raise ValueError(f"{shape[self.dim]} features cannot be shared by {world_size} ranks")
        self.full, self.rank, self.world_size = tuple(shape), rank, world_size
        shape[self.dim] //= world_size
        self.weight = torch.empty(num_experts, *shape, dtype=dtype, device=device)

    def load(self, expert_id: int, weight: Tensor, shard_id: int | None = None) -> None:
        if shard_id is not None or tuple(weight.shape) != self.full or not 0 <= expert_id < len(self.weight):
            raise ValueError(f"expert {expert_id}, shard {shard_id}, weight {list(weight.shape)} does not fit")
        self.weight[expert_id].copy_(weight.chunk(self.world_size, self.dim)[self.rank])

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.weight.shape[1])
        start = 0
        for weight, size in zip(self.weight, group_sizes.tolist(), strict=True):
            out[start : start + size] = x[start : start + size] @ weight.T
            start += size
        return out


class RowParallel(ColumnParallel):
    """Each rank keeps columns of every weight, takes the same columns of x, and returns an unreduced partial sum."""

    output = "partial"
    dim = 1
