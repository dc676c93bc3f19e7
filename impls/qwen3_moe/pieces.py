"""Where one key of a checkpoint goes: the part of its tensor that a rank keeps, and its place in a parameter."""

from dataclasses import dataclass
from typing import NamedTuple

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

    @property
    def rows(self) -> range:
        """Those of the checkpoint's tensor that hold what is kept."""
        if self.cut is None or self.cut.dim != 0:
            return range(self.shape[0])
        return range(self.cut.start, self.cut.start + self.cut.size)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The kept columns of some of these rows."""
        return rows if self.cut is None or self.cut.dim == 0 else rows.narrow(*self.cut)

    def place(self, parameters: dict[str, Tensor]) -> Tensor:
        """The view of the parameter that the kept part is written to."""
        assert self.parameter is not None
        return parameters[self.parameter][self.index] if self.index else parameters[self.parameter]
