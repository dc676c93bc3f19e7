"""Where the one reduction goes: every layer that sums over ranks asks here, and nowhere else is anything reduced.

| routed output                        | shared expert partial          | shared expert replicated                |
|--------------------------------------|--------------------------------|-----------------------------------------|
| partial                              | add, then the one all_reduce   | all_reduce the routed part, then add    |
| complete (a dispatcher combined it)  | its own reduction, then add    | add, from the rank's own tokens         |
| partial, then sequence parallel      | add before the reduce_scatter  | add after it, on own rows               |

partial + replicated would count the replicated part once per rank; reducing what is complete multiplies it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import scatter_sum

__all__ = ["reduction", "symmetric"]

Group = Any  # a ProcessGroup; None where nothing is partial, or for the world

PARTIAL, REPLICATED, COMPLETE = "partial", "replicated", "complete"
STATES = {
    PARTIAL: "the sum over ranks is the value",
    REPLICATED: "every rank holds the value",
    COMPLETE: "each rank holds the value of its own rows",
}


def reduction(
    routed: Tensor,
    shared: Tensor | None,
    group: Group,
    *,
    routed_state: str,
    shared_state: str | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """The layer's output of this rank, from its routed and its shared part, nothing counted twice.

    Args:
        routed: [T, H].
        shared: [T, H]; None where the layer has no shared expert.
        group: the ranks that hold the parts.
        routed_state: one of STATES, as `shared_state`.
        rows: rows per rank, where each rank is to keep its own only (sequence parallel).

    Returns:
        [T, H], or [rows[rank], H]; a new tensor.

    Raises:
        ValueError: a state that is none, or a shared part without one.
    """
    if routed_state not in STATES or (shared is not None and shared_state not in STATES):
        raise ValueError(f"states are {routed_state!r} and {shared_state!r}, but should be among {', '.join(STATES)}")
    if shared is None:
        return _reduced(routed, routed_state, group, rows)
    if routed_state == shared_state:
        return _reduced(routed + shared, routed_state, group, rows)
    return _reduced(routed, routed_state, group, rows) + _reduced(shared, str(shared_state), group, rows)


def _reduced(value: Tensor, state: str, group: Group, rows: Sequence[int] | None) -> Tensor:
    """`value` after its own reduction over `group`, of the rank's own rows where `rows` are given; never `value`."""
    if state == PARTIAL and rows is not None:
        return scatter_sum(value, rows, group)
    own = value.split(list(rows))[dist.get_rank(group)] if rows is not None and state == REPLICATED else value
    own = own.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
    if state == PARTIAL:
        dist.all_reduce(own, group=group)
    return own


def symmetric(
    routed: Tensor,
    shared: Tensor | None,
    group: Group,
    *,
    routed_state: str,
    shared_state: str | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """As `reduction`, partial sums of all rows through symmetric memory where they fit; a replicated part goes along.

    Raises:
        NotImplementedError: on every rank, where the group is not on GPUs, or Triton is missing.
        ValueError: as `reduction`.
    """
    through = _through(group, routed.device)
    through_memory = routed_state == PARTIAL and rows is None and shared_state != COMPLETE
    if not through_memory or not through.fits(routed.shape, routed.dtype):
        return reduction(routed, shared, group, routed_state=routed_state, shared_state=shared_state, rows=rows)
    if shared is not None and shared_state == PARTIAL:
        routed, shared = routed + shared, None
    return through(routed, residual=shared)[1]


@functools.cache
def _through(group: Group, device: Any) -> Any:
    """One workspace for all layers of a group."""
    from moe_harness.impls.parallel.symmetric import SumNorm, available

    if not available(group):
        raise NotImplementedError("symmetric memory joins GPUs over nccl, by kernels of Triton")
    return SumNorm(group, device)
