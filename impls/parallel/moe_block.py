"""A sparse MoE block of one rank, under any layout of its experts and tokens.

    TP            every expert sharded in I over `tensor`, tokens replicated there       routed PARTIAL over tensor
    EP            whole experts over `experts`, a dispatcher moves tokens                routed COMPLETE
    TP x EP       both: experts over one axis of the ranks, each sharded in I over the other: the dispatcher's result
                  is complete over `experts` and still PARTIAL over `tensor`
    DP x EP       EP whose ranks hold different tokens
    sequence      tokens sharded over `tensor` outside the block: all_gather before, reduce_scatter after

The router and the shared expert's gate are whole on every rank.  Experts may be uneven, redundant (`replicas`: several
physical experts hold one logical expert) or absent (ids from `num_experts` on are zero-experts: the identity).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import gather_counts, gather_rows
from moe_harness.impls.parallel.parallel_linear import MergedColumnParallel, Replicated, RowParallel
from moe_harness.impls.parallel.reduction import COMPLETE, PARTIAL, REPLICATED, reduction

Weights = dict[str, Tensor]
SHARED = ("shared_expert", "shared_experts")  # Qwen's, gated; DeepSeek's, several in one MLP without a gate
Route = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Where experts and tokens are.

    Args:
        tensor: group over which I is sharded; None: it is not.
        dispatcher: class of the dispatcher over `experts`; None: every rank of `experts` holds all experts.
        experts: group over which experts are spread.
        owner: int [physical experts], their rank in `experts`.
        replicas: for each logical expert the physical ones that hold it; None: physical and logical are the same.
        shared_sharded: the shared expert is sharded over `tensor`; otherwise whole on every rank.
        sequence_parallel: tokens come in and go out sharded over `tensor`.
    """

    tensor: dist.ProcessGroup | None = None
    dispatcher: type | None = None
    experts: dist.ProcessGroup | None = None
    owner: Tensor | None = None
    replicas: Sequence[Sequence[int]] | None = None
    shared_sharded: bool = True
    sequence_parallel: bool = False

    def place(self, sharded: bool = True) -> dict[str, int]:
        """rank and world_size of a layer over `tensor`."""
        if self.tensor is None or not sharded:
            return {"rank": 0, "world_size": 1}
        return {"rank": dist.get_rank(self.tensor), "world_size": dist.get_world_size(self.tensor)}


class MoEBlock:
    """One rank's block.

    Args:
        weights: the whole block's, by checkpoint name; this rank keeps its part.
        route: hidden_states [T, H] -> topk_weights, topk_ids [T, k], logical ids; the same function on all ranks.
        reduce: the stage `reduction`: where the one reduction goes.
    """

    def __init__(self, weights: Weights, route: Route, layout: Layout, *, reduce: Callable[..., Tensor] = reduction):
        self.route, self.layout, self.reduce = route, layout, reduce
        self.num_experts = len(weights["experts.gate_up_proj"])
        self.logical = logical_experts(layout.replicas, self.num_experts)
        self.mine = self._own_experts()
        self.gate_up, self.down = self._load_experts(weights)
        prefix = next((p for p in SHARED if f"{p}.down_proj.weight" in weights), None)
        self.shared = None if prefix is None else SharedExpert(weights, prefix, layout)
        self.dispatcher: Any = None
        if layout.dispatcher is not None:
            self.dispatcher = layout.dispatcher(layout.experts, num_experts=len(self.logical), owner=layout.owner)

    def _own_experts(self) -> list[int]:
        """Physical experts of this rank, ascending."""
        if self.layout.dispatcher is None or self.layout.owner is None:
            return list(range(len(self.logical)))
        rank = dist.get_rank(self.layout.experts)
        return (self.layout.owner == rank).nonzero().flatten().tolist()

    def _load_experts(self, weights: Weights) -> tuple[MergedColumnParallel, RowParallel]:
        gate_up, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
        hidden, inner = down.shape[1:]
        place: dict[str, Any] = {**self.layout.place(), "dtype": down.dtype, "device": down.device}
        merged = MergedColumnParallel(len(self.mine), hidden, [inner, inner], **place)
        row = RowParallel(len(self.mine), inner, hidden, **place)
        for local, physical in enumerate(self.mine):
            merged.load(local, gate_up[self.logical[physical]])
            row.load(local, down[self.logical[physical]])
        return merged, row

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [T, H] of this rank -> [T, H]."""
        rows = None
        if self.layout.sequence_parallel and self.layout.tensor is not None:
            rows = gather_counts(len(hidden_states), self.layout.tensor, hidden_states.device)
            hidden_states = gather_rows(hidden_states, rows, self.layout.tensor)
        weights, ids = self.route(hidden_states)
        routed = self._routed(hidden_states, weights, ids)
        shared = None if self.shared is None else self.shared(hidden_states)
        states = {"routed_state": PARTIAL if self.layout.tensor else COMPLETE,
                  "shared_state": None if self.shared is None else self.shared.state}  # fmt: skip
        out = self.reduce(routed, shared, self.layout.tensor, **states, rows=rows)
        identity = zero_experts(hidden_states, weights, ids, self.num_experts)
        if rows is not None:
            identity = identity.split(rows)[dist.get_rank(self.layout.tensor)]
        return out + identity

    def _routed(self, hidden_states: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        ids = physical_ids(ids, self.layout.replicas, self.num_experts)
        if self.dispatcher is None:
            return self._run(hidden_states, weights, ids)
        d = self.dispatcher.dispatch(hidden_states, weights, ids)
        return self.dispatcher.combine(self._run(d.hidden_states, d.topk_weights, d.topk_ids), d)

    def _run(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Weighted sum of each row's local slots, [S, H]; with I sharded a partial sum."""
        at, slots = (ids >= 0).nonzero(as_tuple=True)
        order = ids[at, slots].argsort(stable=True)
        at, slots = at[order], slots[order]
        sizes = torch.bincount(ids[at, slots], minlength=len(self.mine))
        gate, up = self.gate_up(rows[at], sizes).chunk(2, dim=-1)
        out = self.down(F.silu(gate) * up, sizes)
        total = torch.zeros_like(rows, dtype=torch.float32)
        total.index_add_(0, at, weights[at, slots, None].float() * out.float())
        return total.to(rows.dtype)


class SharedExpert:
    """sigmoid(x . g) * MLP(x), or MLP(x) without a gate; the MLP sharded over `tensor` or whole, the gate whole.

    Args:
        prefix: of its weights' names, one of SHARED.
    """

    def __init__(self, weights: Weights, prefix: str, layout: Layout):
        self.sharded = layout.shared_sharded and layout.tensor is not None
        down = weights[f"{prefix}.down_proj.weight"]
        hidden, inner = down.shape
        place: dict[str, Any] = {**layout.place(self.sharded), "dtype": down.dtype, "device": down.device}
        self.gate_up = MergedColumnParallel(1, hidden, [inner, inner], **place)
        self.gate_up.load(0, weights[f"{prefix}.gate_proj.weight"], 0)
        self.gate_up.load(0, weights[f"{prefix}.up_proj.weight"], 1)
        self.down = RowParallel(1, inner, hidden, **place)
        self.down.load(0, down)
        self.gate: Replicated | None = None
        if "shared_expert_gate.weight" in weights:
            self.gate = Replicated(1, hidden, 1, **layout.place(False), dtype=down.dtype, device=down.device)
            self.gate.load(0, weights["shared_expert_gate.weight"])
        # Tokens that only this rank holds make a whole shared expert's output complete instead of replicated.
        self.state = PARTIAL if self.sharded else REPLICATED if layout.tensor is not None else COMPLETE

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [T, H], of the state `state` over `tensor`."""
        sizes = torch.tensor([len(hidden_states)], device=hidden_states.device)
        gate, up = self.gate_up(hidden_states, sizes).chunk(2, dim=-1)
        out = self.down(F.silu(gate) * up, sizes)
        if self.gate is not None:
            out = out * self.gate(hidden_states, sizes).sigmoid()
        return out


def logical_experts(replicas: Sequence[Sequence[int]] | None, num_experts: int) -> list[int]:
    """The logical expert that each physical expert holds.

    Raises:
        ValueError: a physical expert that holds none or two, or a logical expert that nobody holds.
    """
    if replicas is None:
        return list(range(num_experts))
    holds = {physical: logical for logical, group in enumerate(replicas) for physical in group}
    count = sum(len(group) for group in replicas)
    if len(replicas) != num_experts or not all(replicas) or sorted(holds) != list(range(count)):
        raise ValueError(
            f"replicas {list(replicas)} is not a map from {num_experts} logical to physical experts 0..P-1"
        )
    return [holds[physical] for physical in range(count)]


def physical_ids(ids: Tensor, replicas: Sequence[Sequence[int]] | None, num_experts: int) -> Tensor:
    """Logical ids -> physical ids, tokens taking the replicas of an expert in turn; zero-experts and -1 -> -1."""
    real = (ids >= 0) & (ids < num_experts)
    if replicas is None:
        return ids.masked_fill(~real, -1)
    most = max(len(group) for group in replicas)
    table = torch.tensor([[group[i % len(group)] for i in range(most)] for group in replicas], device=ids.device)
    turn = torch.arange(len(ids), device=ids.device)[:, None] % most
    return table[ids.clamp(0, num_experts - 1).long(), turn].masked_fill(~real, -1)


def zero_experts(hidden_states: Tensor, weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """Slots past the real experts give the token itself, weighted; nothing travels and nothing is reduced for them."""
    weight = torch.where(ids >= num_experts, weights, 0).sum(-1, keepdim=True)
    return weight.to(hidden_states.dtype) * hidden_states
