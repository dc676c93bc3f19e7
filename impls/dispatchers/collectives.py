"""Collectives over ranks that hold different numbers of rows, zero included.

Every rank makes the same calls whatever its own number is: a rank without tokens that leaves one out is the commonest
hang of expert parallelism.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(gathered: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Equal blocks of all ranks into one tensor; torch before 2.13 knows it by the older name."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, own, group=group)


def reduce_scatter(own: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    """The sum over ranks of `rows`, in equal blocks; torch before 2.13 knows it by the older name."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, rows, group=group)


def gather_counts(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """`count` of every rank, in order of ranks."""
    own = torch.tensor([count], device=device)
    counts = own.new_empty(dist.get_world_size(group))
    all_gather(counts, own, group)
    return counts.tolist()


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """counts[r] rows go to rank r; returns how many go to and come from each, with one wait for the device."""
    both = torch.stack([counts, torch.empty_like(counts)])
    dist.all_to_all_single(both[1], counts, group=group)
    sent, received = both.tolist()
    return sent, received


def grouped(ranks: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Elements of `ranks` [n] by destination, without a wait for the device.

    Returns:
        how many elements go to each rank, [R], and their indices, grouped by rank in their order; those of rank -1
        stand behind all others.
    """
    kinds = torch.arange(world_size, device=ranks.device)
    order = torch.where(ranks < 0, world_size, ranks).argsort(stable=True)
    return (ranks[:, None] == kinds).sum(0), order


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, in order of ranks: [sum(counts), ...]."""
    gathered = rows.new_empty(sum(counts), *rows.shape[1:])
    if len(set(counts)) == 1:
        all_gather(gathered, rows.contiguous(), group)
        return gathered
    blocks = list(gathered.split(list(counts)))
    if dist.get_backend(group) == "nccl":
        dist.all_gather(blocks, rows.contiguous(), group=group)
        return gathered
    # gloo refuses blocks of different sizes; one broadcast per rank moves the same bytes.
    blocks[dist.get_rank(group)].copy_(rows)
    for source, block in enumerate(blocks):
        dist.broadcast(block, group=group, group_src=source)
    return gathered


def scatter_sum(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of `rows` [sum(counts), H]; each rank gets its own block [counts[rank], H]."""
    own = rows.new_empty(counts[dist.get_rank(group)], *rows.shape[1:])
    if len(set(counts)) == 1:
        reduce_scatter(own, rows.contiguous(), group)
    else:
        dist.reduce_scatter(own, list(rows.contiguous().split(list(counts))), group=group)
    return own


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """rows is grouped by destination, sent[r] for rank r; returns what came, grouped by source."""
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=group)
    return result
