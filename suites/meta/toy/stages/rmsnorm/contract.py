"""The signature of an implementation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def rmsnorm(x: "Tensor", weight: "Tensor", running: "Tensor", *, eps: float = 1e-6) -> "tuple[Tensor, Tensor]":
    """x[T, H] over its rms times weight[H]; the index int[T] of its largest element; running[H] += 1, in place."""
