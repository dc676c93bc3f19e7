"""Adapter of DeepEP's normal kernels (deduplicated all_to_all over NVLink and RDMA), where `deep_ep` is installed.

DeepEP owns experts in equal contiguous blocks and moves bf16 rows; anything else is refused on every rank.
"""

import importlib.util

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher

NVLINK_BYTES = 256 << 20  # the buffer that peers write into; sized for 8 ranks and a hidden size of 8192


class DeepEP(Dispatcher):
    """deep_ep.Buffer behind the dispatcher's interface.

    Raises:
        NotImplementedError: the package is missing, the group is not on GPUs, or experts are placed unevenly.
    """

    supports_copies = False
    scheme = "deepep"
    dtypes = ("bf16",)
    devices = ("cuda",)

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        super().__init__(group, num_experts=num_experts, owner=owner)
        if importlib.util.find_spec("deep_ep") is None:
            raise NotImplementedError("dispatchers:deepep needs the package deep_ep, which is not installed")
        if dist.get_backend(group) != "nccl":
            raise NotImplementedError(f"deep_ep runs on GPUs over nccl, not on {dist.get_backend(group)}")
        self._refuse_uneven()
        import deep_ep

        self.buffer = deep_ep.Buffer(group, NVLINK_BYTES, 0)

    def _refuse_uneven(self) -> None:
        owner = self.tables(torch.device("cpu")).owner[:-1]
        blocks = torch.arange(self.num_experts) * self.world_size // max(self.num_experts, 1)
        if self.num_experts % self.world_size or not torch.equal(owner, blocks):
            raise NotImplementedError("deep_ep places experts in equal contiguous blocks only")

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H] bf16, topk_weights and topk_ids [T_r, k] -> each token once, k' = k.

        Raises:
            NotImplementedError: rows that are not bf16.
        """
        if hidden_states.dtype != torch.bfloat16:
            raise NotImplementedError(f"deep_ep moves bf16 rows here, not {hidden_states.dtype}")
        ids, weights = topk_ids.long().contiguous(), topk_weights.float().contiguous()
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids, self.num_experts)
        rows, local, received, _, handle, _ = self.buffer.dispatch(
            hidden_states.contiguous(),
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        return Dispatched(rows, received, local, handle)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        return self.buffer.combine(expert_output.contiguous(), d.route)[0]
