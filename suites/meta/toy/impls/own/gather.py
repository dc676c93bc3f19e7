"""The stage `gather`."""

import torch
import torch.distributed as dist

__all__ = ["gather", "own_rows_first"]


def gather(rows, group):
    """Rows of all ranks, padded on the way to those of the longest."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(rows)]), group)
    padded = rows.new_zeros(max(int(count) for count in counts), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def own_rows_first(rows, group):
    """As a rank sees them."""
    return gather(rows, group).roll(-dist.get_rank(group) * len(rows), 0)
