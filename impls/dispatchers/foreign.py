"""What the adapters of other projects' dispatchers share: refusals that every rank gives, so none waits."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.common import Dispatcher


def refuse_uneven(dispatcher: Dispatcher, library: str) -> None:
    """Refuse all placements but rank r holding the r-th of equal runs of experts (NotImplementedError)."""
    experts, ranks = dispatcher.num_experts, dispatcher.world_size
    owner = dispatcher.tables(torch.device("cpu")).owner[:-1]
    blocks = torch.arange(experts) * ranks // max(experts, 1)
    if experts == 0 or experts % ranks or not torch.equal(owner, blocks):
        raise NotImplementedError(f"{library} places experts in equal contiguous blocks only")


def refuse_masked(topk_ids: Tensor, group: dist.ProcessGroup, library: str) -> None:
    """Refuse ids of -1, on every rank where there is one on any (NotImplementedError)."""
    masked = (topk_ids < 0).any().to(torch.int32).reshape(1)
    dist.all_reduce(masked, op=dist.ReduceOp.MAX, group=group)
    if masked.item():
        raise NotImplementedError(f"{library} sends every slot to an expert: it takes no masked slot (-1)")
