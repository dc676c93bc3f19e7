"""Megatron Core's `MoEAlltoAllTokenDispatcher`, one rank of tensor parallelism.  Read in 0.16.1.

One row per (token, expert): tokens are spread over a map [T, E], so that an expert met twice in a row counts once, with
the sum of its weights.  The object keeps what its combine needs, so every dispatch has one of its own.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher
from moe_harness.impls.dispatchers.foreign import refuse_uneven
from moe_harness.impls.foreign import needed
from moe_harness.impls.megatron.router import INSTALL

__all__ = ["dispatcher"]


class TokenDispatcher(Dispatcher):
    """The library's dispatcher behind the contract's interface.

    Raises:
        NotImplementedError: megatron-core is not installed, the group is not on GPUs, or experts are placed unevenly.
    """

    supports_copies = False
    scheme = "megatron"
    devices = ("cuda",)
    backend = "nccl"

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor):
        super().__init__(group, num_experts=num_experts, owner=owner)
        self.kind = needed("megatron.core.transformer.moe.token_dispatcher", "MoEAlltoAllTokenDispatcher", INSTALL)
        self.config = needed("megatron.core.transformer.transformer_config", "TransformerConfig", INSTALL)
        if dist.get_backend(group) != self.backend:
            raise NotImplementedError("megatron's dispatcher copies its counts on a CUDA stream: over nccl only")
        refuse_uneven(self, "megatron")

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> a row for each slot, by expert, k' = 1."""
        library = self._library(hidden_states.shape[1], topk_ids.shape[1])
        live = topk_ids >= 0
        ids, weights = topk_ids.long().clamp(min=0), topk_weights.float().masked_fill(~live, 0.0)
        probs = weights.new_zeros(len(ids), self.num_experts).scatter_add(1, ids, weights)
        chosen = probs.new_zeros(probs.shape).scatter_add(1, ids, live.float()) > 0
        rows, scales = library.dispatch_preprocess(hidden_states.contiguous(), chosen, probs)
        rows, scales = library.token_dispatch(rows, scales)
        rows, sizes, scales = library.dispatch_postprocess(rows, scales)
        local = torch.repeat_interleave(torch.arange(len(sizes)), sizes.cpu()).to(ids.device)
        return Dispatched(rows, scales[:, None], local[:, None], library)

    def _library(self, hidden_size: int, top_k: int) -> Any:
        """Its dispatcher for these sizes."""
        held = self.num_experts // self.world_size
        config = self.config(
            num_layers=1, hidden_size=hidden_size, num_attention_heads=1, num_moe_experts=self.num_experts,
            moe_router_topk=top_k, moe_token_dispatcher_type="alltoall", expert_model_parallel_size=self.world_size,
        )  # fmt: skip
        groups = SimpleNamespace(ep=self.group, expt_tp=None, tp_ep=self.group)
        own = list(range(self.rank * held, (self.rank + 1) * held))
        return self.kind(held, own, config, pg_collection=groups)

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H]."""
        library = d.route
        return library.combine_postprocess(library.token_combine(library.combine_preprocess(expert_output)))


dispatcher = TokenDispatcher
