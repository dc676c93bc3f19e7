"""Where one key of a checkpoint goes: the part of its tensor that a rank keeps, and its place in a parameter."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Cut(NamedTuple):
    """The part [start, start + size) of a dimension of the checkpoint's tensor that this rank keeps."""

    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Piece:
    """One key of the checkpoint: its full shape, and where the kept part goes.

    `index` picks the destination inside the parameter: an expert's number or rows [start, stop).  `parameter` None: the
    tensor belongs to another rank and is only checked.
    """

    shape: tuple[int, ...]
    parameter: str | None
    index: tuple[int | slice, ...] = ()
    cut: Cut | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """The kept part of the checkpoint's tensor."""
        return tensor if self.cut is None else tensor.narrow(*self.cut)

    def read(self, stored: Any) -> Tensor:
        """The kept part of a tensor in a file (safetensors' slice of it), nothing else of which is read."""
        if self.cut is None:
            return stored[:]
        here = slice(self.cut.start, self.cut.start + self.cut.size)
        return stored[here] if self.cut.dim == 0 else stored[:, here]

    def place(self, parameters: dict[str, Tensor]) -> Tensor:
        """The view of the parameter that the kept part is written to."""
        assert self.parameter is not None
        return parameters[self.parameter][self.index] if self.index else parameters[self.parameter]
