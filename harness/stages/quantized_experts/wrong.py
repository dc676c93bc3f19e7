"""Standard wrong outputs of the stage `quantized_experts`, and the data that cannot tell them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Excuse, Wrong, common
from moe_harness.reference.experts import local_ids, routed_rows
from moe_harness.reference.quantized_experts import ALPHA, code_values, gated, scaled

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

    def first(self, gate_up: Tensor) -> Tensor:
        """Gate and up of every slot, [T, k, 2I]."""
        both = self.x.new_zeros(*self.ids.shape, gate_up.shape[1])
        for expert, tokens, slots in routed_rows(self.ids):
            both[tokens, slots] = self.x[tokens] @ gate_up[expert].T
        return both if self.gate_up_bias is None else both + self.of_slots(self.gate_up_bias)

    def outputs(self, hidden: Tensor, down: Tensor) -> Tensor:
        """The result [..., T, H] from the hidden values of every slot, [..., T, k, I]."""
        out = hidden.new_zeros(*hidden.shape[:-2], down.shape[1])
        for expert, tokens, slots in routed_rows(self.ids):
            rows = hidden[..., tokens, slots, :] @ down[expert].T
            rows = rows if self.down_bias is None else rows + self.down_bias[expert]
            out.index_add_(-2, tokens, self.weights[tokens, slots, None] * rows)
        return out

    def of_slots(self, bias: Tensor) -> Tensor:
        """The bias of each slot's expert."""
        return bias[self.ids.clamp(min=0)]


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call, [T, H] in fp64; each mistake redoes only what it changes."""
    a, k = call.args, call.keywords
    local = local_ids(a["topk_ids"], k["expert_map"])
    live = local >= 0
    if not bool(live.any()) or not a["hidden_states"].numel():
        return {}
    met = local[live].unique().long()
    numbers = {name: _numbers(call, name, met) for name in ("gate_up", "down")}
    layer = _layer(call, local, met, numbers)
    first = layer.first(layer.gate_up)
    gate, up = first.chunk(2, -1)
    hidden, changed = gated(gate, up, layer.activation), {"gate_up_swapped": gated(up, gate, layer.activation)}
    if layer.gate_up_bias is not None:
        bare = (first - layer.of_slots(layer.gate_up_bias)).chunk(2, -1)
        changed["gate_up_bias_dropped"] = gated(bare[0], bare[1], layer.activation)
    if layer.activation == "swiglu_oai":
        changed["clamp_dropped"] = (up + 1) * gate * (ALPHA * gate).sigmoid()
    value, *others = layer.outputs(torch.stack([hidden, *changed.values()]), layer.down)
    found = common(value) | dict(zip(changed, others, strict=True))
    if live.shape[1] > 1:
        flat = live.double() * (layer.weights.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1))
        if not torch.allclose(flat, layer.weights):
            found["flat_weights"] = replace(layer, weights=flat).outputs(hidden, layer.down)
    if layer.down_bias is not None:
        found["down_bias_dropped"] = replace(layer, down_bias=None).outputs(hidden, layer.down)
    found |= _misscaled(call, layer, hidden, met, numbers)
    return {name: found[name] for name in NAMES if name in found}


def _layer(call: Call, local: Tensor, met: Tensor, numbers: dict[str, Tensor]) -> Layer:
    a, k = call.args, call.keywords
    among = torch.full((len(a["gate_up_proj"]) + 1,), -1, device=met.device)  # the last one serves -1
    among[met] = torch.arange(len(met), device=met.device)
    first, second = (None if k[name] is None else k[name][met].double() for name in ("gate_up_bias", "down_bias"))
    gate_up, down = (_scaled(call, name, numbers[name], met) for name in ("gate_up", "down"))
    weights = a["topk_weights"].double().masked_fill(local < 0, 0.0)
    x, ids = a["hidden_states"].double(), among[local.long()]
    return Layer(x, weights, ids, gate_up, down, first, second, k["activation"])


def _numbers(call: Call, name: str, met: Tensor) -> Tensor:
    """What the codes of the experts `met` stand for before any scale."""
    codes = call.args[f"{name}_proj"]
    codes = codes.view(torch.uint8)[met].view(codes.dtype) if codes.dtype == torch.float8_e4m3fn else codes[met]
    return code_values(codes, call.keywords["format"])


def _scaled(call: Call, name: str, numbers: Tensor, scaled_as: Tensor) -> Tensor:
    """Matrices with the scales of the experts `scaled_as`."""
    scale = call.args[f"{name}_scale"]
    return scaled(numbers, None if scale is None else scale[scaled_as], call.keywords["format"])


def _misscaled(call: Call, layer: Layer, hidden: Tensor, met: Tensor, numbers: dict[str, Tensor]) -> Wrong:
    """Scales left out, and those of the next expert."""
    scale = call.args["down_scale"]
    if scale is None:
        return {}
    found: Wrong = {"scales_dropped": layer.outputs(hidden, numbers["down"])}
    if len(scale) > 1:
        gate_up, down = (_scaled(call, name, numbers[name], (met + 1) % len(scale)) for name in numbers)
        gate, up = layer.first(gate_up).chunk(2, -1)
        other = gated(gate, up, layer.activation)
        found["scales_of_next_expert"] = layer.outputs(other, down)
    return found
