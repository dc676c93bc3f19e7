"""The signature of an implementation of the stage `grouped_linear`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def grouped_linear(
    x: "Tensor", weight: "Tensor", group_sizes: "Tensor", *, bias: "Tensor | None" = None
) -> "Tensor": ...
