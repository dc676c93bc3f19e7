"""Adapters of dispatchers over stand-ins of their libraries, to be judged over ranks: import this file, by its path.

The stand-ins are there while an adapter is built, which is when it looks for its library, and gone for what the same
process judges next.  What travels goes through this project's own
all_to_all; each stand-in takes what its library takes, as that library wants it.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.registry import find

INT = torch.int64


@contextlib.contextmanager
def _present() -> Iterator[None]:
    """The stand-ins in the place of whatever there is of their packages."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    try:
        for name in before:
            del sys.modules[name]
        for path, contents in STANDINS.items():
            parts = path.split(".")
            for n in range(1, len(parts) + 1):
                sys.modules.setdefault(".".join(parts[:n]), ModuleType(parts[n - 1]))
            vars(sys.modules[path]).update(contents)
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.modules.update(before)


def _over(spec: str, group: Any, experts: int) -> Any:
    """This project's dispatcher over experts in equal blocks."""
    ranks = torch.distributed.get_world_size(group)
    return find("dispatcher", spec)(group, num_experts=experts, owner=torch.arange(experts) * ranks // experts)


class _ByExpert:
    """Rows of (row, expert) pairs sent to their experts, sorted by them, and back."""

    def __init__(self, group: Any, experts: int, rows: Tensor, weights: Tensor, ids: Tensor):
        self.dispatcher = _over("dispatchers:all_to_all", group, experts)
        self.sent = self.dispatcher.dispatch(rows, weights[:, None], ids[:, None])
        local = self.sent.topk_ids.flatten()
        self.order = local.argsort(stable=True)
        self.rows, self.weights = self.sent.hidden_states[self.order], self.sent.topk_weights.flatten()[self.order]
        self.sizes = torch.bincount(local, minlength=experts // torch.distributed.get_world_size(group))

    def back(self, rows: Tensor) -> Tensor:
        unsorted = torch.empty_like(rows)
        unsorted[self.order] = rows
        return self.dispatcher.combine(unsorted, self.sent)


class AllToAllTokenDispatcher:
    """That of torchtitan 0.3.0."""

    @dataclass(kw_only=True)
    class Config:
        num_experts: int
        top_k: int

    def __init__(self, config: Config):
        self.config = config

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        self.group = ep_mesh.get_group()

    def dispatch(self, x: Tensor, scores: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        top_k = self.config.top_k
        assert scores.shape == ids.shape == (len(x), top_k)
        assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=self.config.num_experts))
        ones = torch.ones(ids.numel())
        sent = _ByExpert(self.group, self.config.num_experts, x.repeat_interleave(top_k, 0), ones, ids.flatten())
        return sent.rows, sent.sizes, (sent, scores)

    def combine(self, rows: Tensor, metadata: tuple[_ByExpert, Tensor], x: Tensor) -> Tensor:
        sent, scores = metadata
        slots = sent.back(rows).float() * scores.reshape(-1, 1)
        return slots.view(*scores.shape, -1).sum(1).to(x.dtype).reshape(x.shape)


@dataclass(kw_only=True)
class TransformerConfig:
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_moe_experts: int
    moe_router_topk: int
    moe_token_dispatcher_type: str
    expert_model_parallel_size: int


class MoEAlltoAllTokenDispatcher:
    """That of Megatron Core 0.16.1."""

    def __init__(self, held: int, own: list[int], config: TransformerConfig, pg_collection: Any = None):
        assert config.moe_token_dispatcher_type == "alltoall" and pg_collection.expt_tp is None
        assert own == [own[0] + n for n in range(held)]
        assert held * config.expert_model_parallel_size == config.num_moe_experts
        self.config, self.group = config, pg_collection.ep

    def dispatch_preprocess(self, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        assert routing_map.dtype == torch.bool and probs.shape == routing_map.shape
        self.shape, (self.token, self.expert) = hidden.shape, routing_map.nonzero(as_tuple=True)
        return hidden[self.token], probs[self.token, self.expert]

    def token_dispatch(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.sent = _ByExpert(self.group, self.config.num_moe_experts, rows, probs, self.expert)
        return self.sent.rows, self.sent.weights

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rows, self.sent.sizes, probs

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return rows

    def token_combine(self, rows: Tensor) -> Tensor:
        return self.sent.back(rows)

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.shape).index_add_(0, self.token, rows)


class Buffer:
    """That of deep_ep 1.2.1, inside a node."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0):
        assert num_nvl_bytes > 0 and num_rdma_bytes == 0
        self.group = group

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == INT
        self.experts = num_experts
        return "per rank", None, "per expert", "in rank", None

    def dispatch(self, x: Tensor, *, topk_idx: Tensor, topk_weights: Tensor, **layout: Any) -> tuple[Any, ...]:
        assert (x.dtype, topk_idx.dtype, topk_weights.dtype) == (torch.bfloat16, INT, torch.float32)
        assert layout == {
            "num_tokens_per_rank": "per rank", "num_tokens_per_rdma_rank": None,
            "num_tokens_per_expert": "per expert", "is_token_in_rank": "in rank",
        }  # fmt: skip
        dispatcher = _over("dispatchers:all_to_all_dedup", self.group, self.experts)
        d = dispatcher.dispatch(x, topk_weights, topk_idx)
        return d.hidden_states, d.topk_ids, d.topk_weights, [], SimpleNamespace(by=dispatcher, d=d), None

    def combine(self, x: Tensor, handle: Any) -> tuple[Tensor, None, None]:
        assert x.dtype == torch.bfloat16
        return handle.by.combine(x, handle.d), None, None


STANDINS: dict[str, dict[str, Any]] = {
    "torchtitan.models.common.token_dispatcher": {"AllToAllTokenDispatcher": AllToAllTokenDispatcher},
    "torchtitan.distributed.utils": {"set_spmd_backend": lambda name: None},
    "megatron.core.transformer.moe.token_dispatcher": {"MoEAlltoAllTokenDispatcher": MoEAlltoAllTokenDispatcher},
    "megatron.core.transformer.transformer_config": {"TransformerConfig": TransformerConfig},
    "deep_ep": {"Buffer": Buffer},
}
PACKAGES = {path.partition(".")[0] for path in STANDINS}


class OnTheCPU:
    devices = ("cpu",)
    backend = "gloo"

    def __init__(self, *given: Any, **more: Any):
        with _present():
            super().__init__(*given, **more)


class torchtitan(OnTheCPU, find("dispatcher", "torchtitan")): ...


class megatron(OnTheCPU, find("dispatcher", "megatron")): ...


class deepep(OnTheCPU, find("dispatcher", "dispatchers:deepep")): ...
