"""What half a layer yields: its output [T, H], or what the norm behind it makes of work that it left half done."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BySlot:
    """What the experts of a sparse layer yield, [T * k, H] with weights and ids [T, k]: the next norm sums it.

    `local` int64 [E]: this rank's numbers of the ids, -1 where the expert is another's; None where ids are numbers.
    """

    rows: Tensor
    weights: Tensor
    ids: Tensor
    local: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """A projection in parts over its depth, fp32 [n, T, H]: the next norm adds them up."""

    parts: Tensor


@dataclass(frozen=True)
class Unsummed:
    """This rank's part [T, H] of a sum over ranks that the norm behind it makes, in the same launch."""

    part: Tensor | BySlot | Parts


Output = Tensor | BySlot | Parts | Unsummed
