"""local_allreduce: every rank already holds the same tokens; each runs its own experts, one all_reduce sums.

Nothing is dispatched.  2 (R-1)/R T H s bytes per rank.  On tokens that differ between ranks the sum would mix the
tokens of different requests without any sign of it, so `dispatch` compares checksums, unless the caller knows better.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import all_gather
from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher


class LocalAllreduce(Dispatcher):
    """all_reduce of each rank's part; needs identical tokens, weights and ids on every rank.

    Args:
        verify: compare the ranks' tokens in every call, a small collective whose result the host reads; without it
            the layer can be captured in a CUDA graph.
    """

    scheme = "local_allreduce"
    requires_replicated_tokens = True

    def __init__(
        self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor, logical: Tensor | None = None,
        verify: bool = True,
    ):  # fmt: skip
        super().__init__(group, num_experts=num_experts, owner=owner, logical=logical)
        self.verify = verify

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T, H], topk_weights and topk_ids [T, k] -> the same rows.

        Raises:
            ValueError: on every rank, where tokens, weights or ids differ between ranks.
        """
        if self.verify:
            self._check_replicated(hidden_states, topk_weights, topk_ids)
        return Dispatched(hidden_states.clone(), topk_weights.clone(), self.own_ids(self.physical(topk_ids)))

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [T, H] -> the sum over ranks, [T, H], on every rank."""
        total = expert_output.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
        dist.all_reduce(total, group=self.group)
        return total

    def _check_replicated(self, *tensors: Tensor) -> None:
        own = torch.stack([tensors[0].new_tensor(len(tensors[0]), dtype=torch.int64), *map(_checksum, tensors)])
        sums = own.new_empty(self.world_size * len(own))
        all_gather(sums, own, self.group)
        differs = (sums.view(self.world_size, -1) != sums[: len(own)]).any(1).nonzero().flatten().tolist()
        if differs:
            raise ValueError(f"local_allreduce needs the same tokens on every rank; ranks {differs} differ from rank 0")


def _checksum(tensor: Tensor) -> Tensor:
    """A number that changes with any bit and with the order of the elements."""
    held = tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of size 1
    bits = held.flatten().view(torch.uint8).to(torch.int64)
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return ((bits + 1) * (places * 2654435761 % 1000003)).sum()
