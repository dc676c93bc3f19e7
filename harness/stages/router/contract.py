"""The signature of an implementation of the stage `router`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def router(
    router_logits: "Tensor", *, top_k: int, scoring: str = "softmax", renormalize: bool = True,
    correction_bias: "Tensor | None" = None, num_expert_group: int | None = None, topk_group: int | None = None,
    routed_scaling_factor: float = 1.0,
) -> "tuple[Tensor, Tensor]": ...  # fmt: skip
