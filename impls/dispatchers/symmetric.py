"""symmetric: for few tokens on NVLink, each rank writes its rows into the memory of every other, two kernels in all.

A gather of hidden states, weights and ids, and a sum over ranks, through symmetric memory (`_put`).  With `max_tokens`
nothing is read back to the host and shapes depend on it alone, so dispatch and combine can be captured in a CUDA graph
and replayed with other tokens and routing.  Without it the ranks compare their numbers of tokens, which costs one host
read; more than MAX_TOKENS on any rank go through allgather_reducescatter on every rank.

On four H200s, 64 tokens of H = 2048 per rank take 31 us there and back alone in a graph and 47 us called one by one,
NCCL with known counts 65 and 155; with 1024 tokens NCCL is faster (suites/performance/data/dispatch_h200x4.json).

Bytes per rank: (R-1) T (H s + k (s_w + s_i)) out, (R-1) T H s back.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.allgather_reducescatter import AllgatherReducescatter
from moe_harness.impls.dispatchers.common import Dispatched, Dispatcher
from moe_harness.impls.launching import Prepared

MAX_TOKENS = 128  # what is worth writing in this way where no bound is given
ALIGNMENT = 128
SMALLEST = 8 << 20  # bytes in a half, so that most calls find a workspace that is large enough


@dataclass(frozen=True)
class Workspace:
    """A buffer at the same offsets on every rank: flags, then two halves."""

    buffer: Tensor  # uint8, this rank's
    peers: Tensor  # int64 [R], addresses of all ranks' buffers
    epochs: Tensor  # int64 [PROGRAMS], calls made
    handle: Any = None  # keeps the peers' memory mapped

    @property
    def first(self) -> int:
        """Where the first half begins."""
        return _aligned(2 * len(self.epochs) * len(self.peers) * 8)

    @property
    def half(self) -> int:
        """Bytes in each half; the same for all calls, since one may still be read while the next is written."""
        return (self.buffer.numel() - self.first) // 2 // ALIGNMENT * ALIGNMENT

    @classmethod
    def mapped(cls, group: dist.ProcessGroup, size: int, device: torch.device, programs: int) -> "Workspace":
        """A collective: allocate and map the memory of all ranks."""
        import torch.distributed._symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(buffer, group)
        buffer.zero_()
        handle.barrier(channel=0)  # nobody's flags are cleared after the first is raised
        peers = [handle.get_buffer(q, (size,), torch.uint8).data_ptr() for q in range(handle.world_size)]
        epochs = torch.zeros(programs, dtype=torch.int64, device=device)
        torch.cuda.current_stream(device).synchronize()
        return cls(buffer, torch.tensor(peers, dtype=torch.int64, device=device), epochs, handle)


_WORKSPACES: dict[tuple[str, torch.device], list[Workspace]] = {}  # the last is the largest; graphs hold older ones


class Plan(NamedTuple):
    """What all calls with rows of one kind share."""

    bound: int
    space: Workspace
    gather: Prepared
    scatter_sums: dict[tuple[torch.dtype, int], Prepared]  # by dtype and width of the experts' output


class Route(NamedTuple):
    """The number of own tokens, those of each rank on the device, and what the fallback dispatched."""

    tokens: int
    counts: Tensor
    plan: Plan
    fallback: Dispatched | None = None


class Symmetric(Dispatcher):
    """Direct writes over NVLink.

    Args:
        max_tokens: bound of T_r on every rank; None lets the ranks compare their numbers in each call.

    Raises:
        NotImplementedError: on every rank, where the group is not on GPUs or Triton is missing.
        ValueError: on a rank with more than max_tokens tokens.
    """

    supports_copies = False
    scheme = "symmetric"
    devices = ("cuda",)
    dtypes = ("fp32", "bf16", "fp16")

    @classmethod
    def for_equal(cls, tokens: int) -> dict[str, Any] | None:
        return {"max_tokens": tokens}

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, owner: Tensor, max_tokens: int | None = None):
        super().__init__(group, num_experts=num_experts, owner=owner)
        self._require()
        from moe_harness.impls.dispatchers import _put

        self.kernels, self.max_tokens = _put, max_tokens
        self.large = AllgatherReducescatter(group, num_experts=num_experts, owner=owner)
        self.constants = {"RANK": self.rank, "RANKS": self.world_size, "PROGRAMS": _put.PROGRAMS, "TILE": _put.TILE}
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def _require(self) -> None:
        if dist.get_backend(self.group) != "nccl":
            raise NotImplementedError(f"symmetric memory joins GPUs, not ranks on {dist.get_backend(self.group)}")
        if importlib.util.find_spec("triton") is None:
            raise NotImplementedError("dispatchers:symmetric needs Triton, which is not installed")

    def _workspace(self, half: int, device: torch.device) -> Workspace:
        """One for all dispatchers of a group, made anew where a larger one is needed: a collective then."""
        known = _WORKSPACES.setdefault((self.group.group_name, device), [])
        if not known or known[-1].half < half:
            size = _aligned(2 * self.kernels.PROGRAMS * self.world_size * 8) + 2 * max(half, SMALLEST)
            known.append(self._mapped(size, device))
        return known[-1]

    def _mapped(self, size: int, device: torch.device) -> Workspace:
        return Workspace.mapped(self.group, size, device, self.kernels.PROGRAMS)

    def _plan(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Plan:
        """The plan of these dtypes and widths; made at their first call, which may be a collective."""
        width, top_k, device = hidden_states.shape[1], topk_ids.shape[1], hidden_states.device
        key = (hidden_states.dtype, topk_weights.dtype, topk_ids.dtype, width, top_k, device)
        known = self._plans.get(key)
        if known is not None:
            return known
        self._check(hidden_states, topk_weights, topk_ids)
        bound = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        rows = self.world_size * bound
        # Weights and ids stand behind the hidden states, at the same places for any dtype.
        at_weights = _aligned(rows * width * 4)
        at_ids = at_weights + _aligned(rows * top_k * 4)
        space = self._workspace(at_ids + _aligned(rows * top_k * 8), device)
        fixed = (self.tables(device).own, space.peers, space.epochs, bound, width, top_k, self.num_experts)
        places = (space.first, space.half, at_weights, at_ids)
        constants = {**self.constants, "SLOTS": self.kernels.MAX_TOP_K}
        gather = Prepared(self.kernels.gather, self.kernels.PROGRAMS, (*fixed, *places), constants)
        return self._plans.setdefault(key, Plan(bound, space, gather, {}))

    def _scatter_sum(self, plan: Plan, dtype: torch.dtype, width: int) -> Prepared:
        if dtype.itemsize > 4:
            raise NotImplementedError(f"symmetric sums rows of up to 32 bits per element, not {dtype}")
        space = plan.space
        fixed = (space.peers, space.epochs, plan.bound, width, space.first, space.half)
        return Prepared(self.kernels.scatter_sum, self.kernels.PROGRAMS, fixed, self.constants)

    def dispatch(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """hidden_states [T_r, H], topk_weights and topk_ids [T_r, k] -> [R * bound, ...], padded with ids -1."""
        tokens, width = hidden_states.shape
        plan = self._plan(hidden_states, topk_weights, topk_ids)
        if tokens > plan.bound and self.max_tokens is not None:
            raise ValueError(f"this rank holds {tokens} tokens, but max_tokens is {self.max_tokens}")
        rows, top_k = self.world_size * plan.bound, topk_ids.shape[1]
        out = Dispatched(
            hidden_states.new_empty(rows, width), topk_weights.new_empty(rows, top_k), topk_ids.new_empty(rows, top_k)
        )
        counts = plan.space.epochs.new_empty(self.world_size)
        plan.gather(
            placed(hidden_states), placed(topk_weights), placed(topk_ids),
            out.hidden_states, out.topk_weights, out.topk_ids, counts, tokens,
        )  # fmt: skip
        out.route = Route(tokens, counts, plan)
        if self.max_tokens is None and max(counts.tolist()) > plan.bound:
            large = self.large.dispatch(hidden_states, topk_weights, topk_ids)
            route = Route(tokens, counts, plan, large)
            return Dispatched(large.hidden_states, large.topk_weights, large.topk_ids, route)
        return out

    def combine(self, expert_output: Tensor, d: Dispatched) -> Tensor:
        """expert_output [S, H] -> this rank's tokens, [T_r, H], in the dtype of expert_output."""
        route: Route = d.route
        if route.fallback is not None:
            return self.large.combine(expert_output, route.fallback)
        kind = (expert_output.dtype, expert_output.shape[1])
        if kind not in route.plan.scatter_sums:
            route.plan.scatter_sums[kind] = self._scatter_sum(route.plan, *kind)
        result = expert_output.new_empty(route.tokens, kind[1])
        route.plan.scatter_sums[kind](placed(expert_output), route.counts, result, route.tokens)
        return result

    def _check(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        if topk_ids.shape[1] > self.kernels.MAX_TOP_K:
            raise NotImplementedError(f"k is {topk_ids.shape[1]}, but symmetric takes at most {self.kernels.MAX_TOP_K}")
        if max(hidden_states.element_size(), topk_weights.element_size()) > 4:
            raise NotImplementedError("symmetric moves hidden states and weights of up to 32 bits per element")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def placed(tensor: Tensor) -> Tensor:
    """The same values without gaps, at an address that is a multiple of 16."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
