"""Standard wrong outputs of the stage `quantized_experts`, and the data that cannot tell them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.wrong_outputs import Excuse, Wrong, common
from moe_harness.reference.experts import local_ids, routed_rows
from moe_harness.reference.quantized_experts import ALPHA, MX_BIAS, dequantised, quantized_experts

NAMES = (
    "all_zeros", "doubled", "scales_of_next_expert", "scales_dropped", "gate_up_swapped", "flat_weights",
    "gate_up_bias_dropped", "down_bias_dropped", "clamp_dropped", "one_row_zeroed", "one_element_off",
)  # fmt: skip

EXCUSES = (
    Excuse("flat_weights", lambda c: c.layout == "expert_map:expanded", "every slot on one expert"),
    Excuse("scales_of_next_expert", lambda c: c.layout.endswith("scale:expanded"), "all experts have these scales"),
    Excuse("gate_up_swapped", lambda c: c.data == "tiny", "silu(g) is g / 2 there, so gate and up are alike"),
)


@dataclass
class Layer:
    """A call taken apart in fp64, its matrices those of the experts that its rows meet."""

    x: Tensor
    weights: Tensor  # [T, k], 0 in masked slots
    ids: Tensor  # [T, k], among the experts that are met; -1 where masked
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    def run(self, **changes: Any) -> Tensor:
        """The result [T, H], with some of these changed."""
        given = vars(self) | changes
        return quantized_experts(
            given["x"], given["gate_up"], None, given["down"], None, given["weights"], given["ids"], format="plain",
            activation=given["activation"], gate_up_bias=given["gate_up_bias"], down_bias=given["down_bias"],
        )  # fmt: skip

    def unclamped(self) -> Tensor:
        """The result of swiglu_oai without its limits."""
        out = torch.zeros_like(self.x)
        for expert, tokens, slots in routed_rows(self.ids):
            first = self.x[tokens] @ self.gate_up[expert].T
            gate, up = (first if self.gate_up_bias is None else first + self.gate_up_bias[expert]).chunk(2, -1)
            rows = ((up + 1) * gate * (ALPHA * gate).sigmoid()) @ self.down[expert].T
            rows = rows if self.down_bias is None else rows + self.down_bias[expert]
            out.index_add_(0, tokens, self.weights[tokens, slots, None] * rows)
        return out


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call, [T, H] in fp64."""
    a, k = call.args, call.keywords
    local = local_ids(a["topk_ids"], k["expert_map"])
    live = local >= 0
    if not bool(live.any()) or not a["hidden_states"].numel():
        return {}
    met = local[live].unique().long()
    layer = _layer(call, local, met)
    value = layer.run()
    found = common(value)
    if live.shape[1] > 1:
        flat = live.double() * (layer.weights.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1))
        if not torch.allclose(flat, layer.weights):
            found["flat_weights"] = layer.run(weights=flat)
    found |= _misscaled(call, layer, met)
    for name in ("gate_up_bias", "down_bias"):
        if k[name] is not None:
            found[f"{name}_dropped"] = layer.run(**{name: None})
    swapped = None if layer.gate_up_bias is None else torch.cat(layer.gate_up_bias.chunk(2, -1)[::-1], -1)
    found["gate_up_swapped"] = layer.run(gate_up=torch.cat(layer.gate_up.chunk(2, 1)[::-1], 1), gate_up_bias=swapped)
    if k["activation"] == "swiglu_oai":
        found["clamp_dropped"] = layer.unclamped()
    return {name: found[name] for name in NAMES if name in found}


def _layer(call: Call, local: Tensor, met: Tensor) -> Layer:
    a, k = call.args, call.keywords
    among = torch.full((len(a["gate_up_proj"]) + 1,), -1, device=met.device)  # the last one serves -1
    among[met] = torch.arange(len(met), device=met.device)
    first, second = (None if k[name] is None else k[name][met].double() for name in ("gate_up_bias", "down_bias"))
    return Layer(
        a["hidden_states"].double(), a["topk_weights"].double().masked_fill(local < 0, 0.0), among[local.long()],
        _matrices(call, "gate_up", met, met), _matrices(call, "down", met, met), first, second, k["activation"],
    )  # fmt: skip


def _matrices(call: Call, name: str, met: Tensor, scaled_as: Tensor | None) -> Tensor:
    """Matrices of the experts `met`, with the scales of others, or (None) without."""
    codes, scale = call.args[f"{name}_proj"], call.args[f"{name}_scale"]
    if scale is not None and scaled_as is None:
        scale = torch.full_like(scale[met], MX_BIAS if scale.dtype == torch.uint8 else 1)
    elif scale is not None:
        scale = scale[scaled_as]
    codes = codes.view(torch.uint8)[met].view(codes.dtype) if codes.dtype == torch.float8_e4m3fn else codes[met]
    return dequantised(codes, scale, call.keywords["format"])


def _misscaled(call: Call, layer: Layer, met: Tensor) -> Wrong:
    """Scales left out, and those of the next expert."""
    scale = call.args["down_scale"]
    if scale is None:
        return {}
    found: Wrong = {"scales_dropped": layer.run(down=_matrices(call, "down", met, None))}
    if len(scale) > 1:
        after = (met + 1) % len(scale)
        found["scales_of_next_expert"] = layer.run(
            gate_up=_matrices(call, "gate_up", met, after), down=_matrices(call, "down", met, after)
        )
    return found
