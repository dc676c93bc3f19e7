"""The signature of an implementation of the stage `rope_cache`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What `rounds` may hold: the normalised head before its weight and after it, cosine and sine, and the products with
# them before they are added.
ROUNDINGS = ("normalized", "norm_output", "cos_sin", "rotated")


def rope_cache(
    q: "Tensor", k: "Tensor", v: "Tensor", positions: "Tensor", slots: "Tensor", key_cache: "Tensor",
    value_cache: "Tensor", *, q_norm: "Tensor | None" = None, k_norm: "Tensor | None" = None, eps: float = 1e-6,
    theta: float,
) -> "Tensor": ...  # fmt: skip
