"""The signature of an implementation of the stage `moe_block`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def moe_block(hidden_states: "Tensor", weights: "dict[str, Tensor]", config: dict[str, Any]) -> "Tensor": ...
