"""Where the one reduction goes: every layer that sums over ranks asks here, and nowhere else is anything reduced.

| routed output                        | shared expert PARTIAL          | shared expert REPLICATED                |
|--------------------------------------|--------------------------------|-----------------------------------------|
| PARTIAL                              | add, then the one all_reduce   | all_reduce the routed part, then add    |
| COMPLETE (a dispatcher combined it)  | its own reduction, then add    | add, from the rank's own tokens         |
| PARTIAL, then sequence parallel      | add before the reduce_scatter  | add after it, on own rows               |

PARTIAL + REPLICATED would count the replicated part once per rank; reducing what is complete multiplies it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch.distributed as dist
from torch import Tensor

from moe_harness.impls.dispatchers.collectives import scatter_sum


class State(Enum):
    """What a tensor is over the ranks of a group."""

    PARTIAL = "the sum over ranks is the value"
    REPLICATED = "every rank holds the value"
    COMPLETE = "each rank holds the value of its own rows"


@dataclass(frozen=True)
class Placed:
    """A tensor [T, H] and its state."""

    tensor: Tensor
    state: State

    def __add__(self, other: "Placed") -> "Placed":
        if self.state is not other.state:
            raise TypeError(f"{self.state.name} + {other.state.name}: reduce the partial one first")
        return Placed(self.tensor + other.tensor, self.state)


def reduced(value: Placed, group: dist.ProcessGroup, rows: Sequence[int] | None = None) -> Placed:
    """`value` after its reduction over `group`; what needs none is returned as it is.

    Args:
        rows: rows per rank where each rank is to keep its own only (sequence parallel).
    """
    if value.state is State.PARTIAL and rows is not None:
        return Placed(scatter_sum(value.tensor, rows, group), State.COMPLETE)
    if value.state is State.PARTIAL:
        total = value.tensor.clone()
        dist.all_reduce(total, group=group)
        return Placed(total, State.REPLICATED)
    if value.state is State.REPLICATED and rows is not None:
        own = value.tensor.split(list(rows))[dist.get_rank(group)]
        return Placed(own, State.COMPLETE)
    return value


def finish(
    routed: Placed, shared: Placed | None, group: dist.ProcessGroup, rows: Sequence[int] | None = None
) -> Tensor:
    """The layer's output of this rank, from its routed and its shared part.

    Args:
        shared: None where the layer has no shared expert.
        rows: rows per rank for sequence parallel, None otherwise.
    """
    if shared is None:
        return reduced(routed, group, rows).tensor
    if routed.state is shared.state:
        return reduced(routed + shared, group, rows).tensor
    if routed.state is State.COMPLETE:
        return routed.tensor + reduced(shared, group, rows).tensor
    return (reduced(routed, group, rows) + reduced(shared, group, rows)).tensor
