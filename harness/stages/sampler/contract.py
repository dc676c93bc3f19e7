"""The signature of an implementation of the stage `sampler`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROUNDINGS: tuple[str, ...] = ()


def sampler(
    logits: "Tensor", *, temperature: "Tensor", top_k: "Tensor | None" = None, top_p: "Tensor | None" = None,
    seeds: "Tensor", positions: "Tensor",
) -> "Tensor": ...  # fmt: skip
