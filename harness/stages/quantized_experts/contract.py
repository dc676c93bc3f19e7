"""The signature of an implementation of the stage `quantized_experts`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("plain", "fp8_block", "fp8_channel", "int8_channel", "int4_group", "mxfp4")
BENCHED = "fp8_block"  # what is timed where no format is asked for
ROUNDINGS = (
    "gate_up", "activation", "expert_output", "weighted", "partial_sum", "routing_weight", "weight",
)  # fmt: skip
# `formats`: those that are accepted; `quantizes`: what becomes of the rows that enter a product.
DECLARATIONS = {"formats": FORMATS, "quantizes": ("fp8_token", "fp8_group128", "int8_token")}


def quantized_experts(
    hidden_states: "Tensor", gate_up_proj: "Tensor", gate_up_scale: "Tensor | None", down_proj: "Tensor",
    down_scale: "Tensor | None", topk_weights: "Tensor", topk_ids: "Tensor", *, format: str, activation: str = "silu",
    expert_map: "Tensor | None" = None, gate_up_bias: "Tensor | None" = None, down_bias: "Tensor | None" = None,
) -> "Tensor": ...  # fmt: skip
