"""Adapter of DeepEP's normal kernels (deduplicated all_to_all over NVLink and RDMA), where `deep_ep` is installed.

Read in 1.2.1, `Buffer`.  It owns experts in equal contiguous blocks and moves bf16 rows of whole 16 bytes between as
many ranks as it has settings for; anything else is refused on every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher
from moe_harness.impls.dispatchers.foreign import refuse_uneven
from moe_harness.impls.foreign import needed

NVLINK_BYTES = 256 << 20  # the buffer that peers write into; sized for 8 ranks and a hidden size of 8192
RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)  # those of its `get_dispatch_config`
INSTALL = "pip install git+https://github.com/deepseek-ai/DeepEP@v1.2.1"


class DeepEP(Dispatcher):
    """deep_ep.Buffer behind the dispatcher's interface.

    Raises:
        NotImplementedError: the package is missing, the group is not on GPUs, experts are placed unevenly, or there
            are no settings for its number of ranks.
    """

    supports_copies = False
    scheme = "deepep"
    dtypes = ("bf16",)
    devices = ("cuda",)
    backend = "nccl"

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        super().__init__(group, num_experts=num_experts, owner=owner)
        kind = needed("deep_ep", "Buffer", INSTALL)
        if dist.get_backend(group) != self.backend:
            raise NotImplementedError(f"deep_ep runs on GPUs over nccl, not on {dist.get_backend(group)}")
        if self.world_size not in RANKS:
            raise NotImplementedError(f"deep_ep has no settings for {self.world_size} ranks")
        refuse_uneven(self, "deep_ep")
        self.buffer = kind(group, NVLINK_BYTES, 0)

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H] bf16, topk_weights and topk_ids [T_r, k] -> each token once, k' = k.

        Raises:
            NotImplementedError: rows that are not bf16, or not of whole 16 bytes.
        """
        if hidden_states.dtype != torch.bfloat16 or hidden_states.shape[1] % 8:
            found = f"{hidden_states.shape[1]} of {hidden_states.dtype}"
            raise NotImplementedError(f"deep_ep moves rows of bf16, a multiple of 8 of them, not {found}")
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
