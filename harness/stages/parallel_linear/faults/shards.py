"""Faults of sharded layers: the wrong part kept, parts in the wrong place, loaders, reductions that are not theirs."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.harness.core.ranked_faults import ranked

# A right layer in small replaceable steps ------------------------------------------------------------------------


class Layer:
    """Local weights and the grouped product; subclasses say which part a rank keeps."""

    kind = "replicated"
    output = "replicated"

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.rank, self.ranks, self.dtype = rank, world_size, dtype
        self.kept: dict[tuple[int, int], Tensor] = {}

    def shard(self, weight: Tensor) -> Tensor:
        return weight

    def load(self, expert_id: int, weight: Tensor, shard_id: int | None = None) -> None:
        self.kept[self.key(expert_id, shard_id or 0)] = self.copy(self.shard(weight))

    def key(self, expert_id: int, shard_id: int) -> tuple[int, int]:
        return expert_id, shard_id

    def copy(self, part: Tensor) -> Tensor:
        return part.clone()

    def weight(self, expert: int) -> Tensor:
        """What expert's rows are multiplied by: its parts, stacked."""
        return torch.cat([part for (e, _), part in sorted(self.kept.items(), key=lambda item: item[0]) if e == expert])

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        blocks = x.split(group_sizes.tolist())
        return torch.cat([rows @ self.weight(expert).T for expert, rows in enumerate(blocks)])


class Column(Layer):
    kind, output = "column", "sharded"

    def shard(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.ranks)[self.rank]


class Merged(Column):
    kind = "merged_column"


class Row(Layer):
    kind, output = "row", "partial"

    def shard(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.ranks, dim=1)[self.rank]


# Faults ----------------------------------------------------------------------------------------------------------


@ranked(
    "TP", source="FlashML-org/FreeToken/pull/104", condition="more than one rank",
    shows="R=2,E=2,K=4,N=4,S=2+3,kind=merged_column", hidden=("R=1,E=2,K=4,N=4,S=2+3,kind=merged_column",),
)  # fmt: skip
class fused_split_in_one_piece(Merged):
    """Rank 0 holds the gate and rank 1 the up projection."""

    def shard(self, weight: Tensor) -> Tensor:
        return weight

    def weight(self, expert: int) -> Tensor:
        return super().weight(expert).chunk(self.ranks)[self.rank]


@ranked(
    "TP", source="GeeeekExplorer/nano-vllm/pull/116", condition="more than one rank",
    shows="R=2,E=1,K=4,N=4,S=3,kind=replicated", hidden=("R=1,E=1,K=4,N=4,S=3,kind=replicated",),
)  # fmt: skip
class gate_row_parallel(Layer):
    """The router's logits are a part of a sum that nobody completes."""

    def shard(self, weight: Tensor) -> Tensor:
        columns = torch.zeros_like(weight)
        kept = weight.chunk(self.ranks, dim=1)[self.rank]
        columns[:, self.rank * kept.shape[1] : (self.rank + 1) * kept.shape[1]] = kept
        return columns


@ranked(
    "TP", source="vllm-project/vllm/pull/31133", condition="more than one rank",
    shows="R=2,E=2,K=4,N=4,S=2+3,kind=row", hidden=("R=1,E=2,K=4,N=4,S=2+3,kind=row",),
)  # fmt: skip
class row_reduces_itself(Row):
    """The layer reduces by itself, and the caller reduces again."""

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        out = super().__call__(x, group_sizes)
        dist.all_reduce(out)
        return out


@ranked("TP", shows="R=2,E=2,K=4,N=4,S=2+3,kind=row", seen_by="contract")
class partial_not_declared(Row):
    """A partial sum is passed off as a result."""

    output = "replicated"


@ranked(
    "TP", source="lightseekorg/tokenspeed/pull/80", condition="rank >= 1", shows="R=2,E=2,K=4,N=4,S=2+3,kind=column",
    hidden=("R=1,E=2,K=4,N=4,S=2+3,kind=column",),
)  # fmt: skip
class rank_left_at_zero(Column):
    """Every rank holds the part of rank 0."""

    def shard(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.ranks)[0]


@ranked(
    "TP", condition="more than one rank", shows="R=2,E=2,K=4,N=4,S=2+3,kind=column",
    hidden=("R=1,E=2,K=4,N=4,S=2+3,kind=column",),
)  # fmt: skip
class rows_interleaved(Column):
    """Ranks hold every R-th row instead of a run of rows."""

    def shard(self, weight: Tensor) -> Tensor:
        return weight[self.rank :: self.ranks]


@ranked("TP", condition="a square weight", shows="R=2,E=2,K=4,N=4,S=2+3,kind=row")
class row_splits_the_output(Row):
    """The output is split where the input should be."""

    def shard(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.ranks)[self.rank].T.contiguous()


@ranked(
    "loading", condition="a square weight", shows="R=1,E=2,K=4,N=4,S=2+3,kind=column",
    hidden=("R=1,E=2,K=4,N=8,S=2+3,kind=column",),
)  # fmt: skip
class layout_from_shape(Column):
    """The layout is guessed from the shape, so a square weight is transposed."""

    def shard(self, weight: Tensor) -> Tensor:
        return super().shard(weight.T if weight.shape[0] == weight.shape[1] else weight)


@ranked("loading", shows="R=1,E=2,K=4,N=4,S=2+3,kind=merged_column")
class up_before_gate(Merged):
    """Up stands where the gate should be."""

    def key(self, expert_id: int, shard_id: int) -> tuple[int, int]:
        return expert_id, 1 - shard_id


@ranked(
    "loading", condition="experts arrive in another order than theirs", shows="R=1,E=3,K=4,N=4,S=2+3+1,kind=column",
    hidden=("R=1,E=1,K=4,N=4,S=2,kind=column",),
)  # fmt: skip
class order_of_arrival(Column):
    """Experts are numbered in the order of arrival."""

    def key(self, expert_id: int, shard_id: int) -> tuple[int, int]:
        return len(self.kept), 0


@ranked("loading", condition="the checkpoint's memory is used again", shows="R=2,E=2,K=4,N=4,S=2+3,kind=column")
class view_of_the_checkpoint(Column):
    """The layer keeps a view of the checkpoint's tensor."""

    def copy(self, part: Tensor) -> Tensor:
        return part


@ranked("loading", shows="R=1,E=2,K=4,N=4,S=2+3,kind=merged_column", seen_by="contract")
class shard_id_ignored(Merged):
    """The second part takes the place of the first."""

    def key(self, expert_id: int, shard_id: int) -> tuple[int, int]:
        return expert_id, 0


@ranked(
    "grouped GEMM", condition="an expert without rows before one with rows",
    shows="R=1,E=3,K=4,N=4,S=2+0+3,kind=replicated", hidden=("R=1,E=3,K=4,N=4,S=2+1+3,kind=replicated",),
)  # fmt: skip
class empty_groups_skipped(Layer):
    """Groups without rows are skipped and all later ones take the expert before."""

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        sizes = [size for size in group_sizes.tolist() if size]
        blocks = x.split(sizes) if sizes else (x,)
        return torch.cat([rows @ self.weight(expert).T for expert, rows in enumerate(blocks)])


@ranked(
    "precision", condition="16 bits", shows="R=1,E=2,K=4,N=4,S=2+3,kind=column,dtype=bf16", seen_by="contract",
    hidden=("R=1,E=2,K=4,N=4,S=2+3,kind=column",),
)  # fmt: skip
class result_in_fp32(Column):
    """The result is wider than the input."""

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        return super().__call__(x, group_sizes).float()


@ranked("memory", shows="R=1,E=2,K=4,N=4,S=2+3,kind=column", seen_by="inputs")
class input_changed(Column):
    """The input is scaled in place."""

    def __call__(self, x: Tensor, group_sizes: Tensor) -> Tensor:
        out = super().__call__(x, group_sizes)
        x.mul_(2)
        return out
