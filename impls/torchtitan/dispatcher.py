"""torchtitan's `AllToAllTokenDispatcher`.  Read and tried, on the CPU over gloo, in 0.3.0.

One row per (token, slot).  Routing weights stay at home and are multiplied in its combine, so that rows carry a weight
of 1 here.  Its sum over the slots of a token is made in the dtype of the rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher
from moe_harness.impls.dispatchers.foreign import refuse_masked, refuse_uneven
from moe_harness.impls.foreign import needed
from moe_harness.impls.torchtitan.router import INSTALL

__all__ = ["dispatcher"]


class TokenDispatcher(Dispatcher):
    """The library's dispatcher behind the contract's interface.

    Raises:
        NotImplementedError: torchtitan is not installed, or experts are placed unevenly.
    """

    supports_copies = False
    scheme = "torchtitan"

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        super().__init__(group, num_experts=num_experts, owner=owner)
        self.kind = needed("torchtitan.models.common.token_dispatcher", "AllToAllTokenDispatcher", INSTALL)
        refuse_uneven(self, "torchtitan")
        # Its other backend takes the group from a mesh that its trainer sets for the whole process.
        needed("torchtitan.distributed.utils", "set_spmd_backend", INSTALL)("partial_dtensor")
        self.mesh = DeviceMesh.from_group(group, "cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> a row for each slot, by expert, k' = 1.

        Raises:
            NotImplementedError: on every rank, where any has a masked slot.
        """
        refuse_masked(topk_ids, self.group, "torchtitan")
        ids = topk_ids.long().contiguous()
        library: Any = self.kind(self.kind.Config(num_experts=self.num_experts, top_k=ids.shape[1]))
        library.wire_meshes(ep_mesh=self.mesh)
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts)
        rows, sizes, metadata = library.dispatch(hidden_states, topk_weights.float().contiguous(), ids, counts)
        local = torch.repeat_interleave(torch.arange(len(sizes), device=ids.device), sizes)[:, None]
        weights = torch.ones(len(rows), 1, device=rows.device)
        return Dispatched(rows, weights, local, (library, metadata, hidden_states.shape))

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        library, metadata, shape = d.route
        return library.combine(expert_output, metadata, expert_output.new_empty(shape))


dispatcher = TokenDispatcher
