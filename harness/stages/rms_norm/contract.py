"""The signature of an implementation of the stage `rms_norm`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What `rounds` may hold: the sum with the residual before it is normalised, and the normalised value before the weight.
ROUNDINGS = ("sum", "normalized")


def rms_norm(
    x: "Tensor", weight: "Tensor", *, eps: float, residual: "Tensor | None" = None
) -> "Tensor | tuple[Tensor, Tensor]": ...
