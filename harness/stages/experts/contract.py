"""The signature of an implementation of the stage `experts`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def experts(
    hidden_states: "Tensor", gate_up_proj: "Tensor", down_proj: "Tensor", topk_weights: "Tensor", topk_ids: "Tensor",
    *, activation: str = "silu", expert_map: "Tensor | None" = None,
) -> "Tensor": ...  # fmt: skip
