"""Standard wrong outputs of the stage `experts`, and the data that cannot tell them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.harness.core.stage import Excuse, Wrong, common, without_last
from moe_harness.reference.experts import activate, local_ids, routed_rows

NAMES = (
    "all_zeros", "doubled", "other_activation", "gate_up_swapped", "last_slot_dropped", "flat_weights",
    "renormalisation_flipped", "last_16_of_I_dropped", "last_of_I_dropped", "one_row_zeroed", "one_element_off",
    "one_token_to_wrong_expert",
)  # fmt: skip

SATURATED = ("exact", "partial_sums", "deep_sums", "outside_fp16")
EXCUSES = (
    Excuse("flat_weights", lambda c: c.routing == "duplicates" and c.k == 2, "both slots on one expert"),
    Excuse("flat_weights", lambda c: c.layout == "expert_map:expanded", "every slot on one expert"),
    Excuse("other_activation", lambda c: c.data in SATURATED, "both saturate"),
)


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong result of the call."""
    return experts(layer_of(call))


@dataclass
class Parts:
    """A call of the experts taken apart in fp64, so that each mistake redoes only what it changes."""

    hidden_states: Tensor  # [T, H]
    gate_up: Tensor  # [E, 2I, H]
    down: Tensor  # [E, H, I]
    weights: Tensor  # [T, k]; 0 in masked slots
    ids: Tensor  # [T, k], local; -1 where masked
    activation: str
    flipped: Tensor  # [T, k], the routing weights with the renormalisation the other way round

    def halves(self) -> tuple[Tensor, Tensor]:
        """(gate, up) of every slot, [T, k, I]."""
        both = self.hidden_states.new_zeros(*self.ids.shape, self.gate_up.shape[1])
        for expert, tokens, slots in routed_rows(self.ids):
            both[tokens, slots] = self.hidden_states[tokens] @ self.gate_up[expert].double().T
        gate, up = both.chunk(2, dim=-1)
        return gate, up

    def outputs(self, hidden: Tensor) -> Tensor:
        """Output of every slot, [..., T, k, H], from its hidden values [..., T, k, I]."""
        out = hidden.new_zeros(*hidden.shape[:-1], self.down.shape[1])
        for expert, tokens, slots in routed_rows(self.ids):
            out[..., tokens, slots, :] = hidden[..., tokens, slots, :] @ self.down[expert].double().T
        return out


def layer_of(call: Call) -> Parts:
    """The layer of a call of the stage `experts`."""
    hidden, gate_up, down, weights, ids = call.args.values()
    local = local_ids(ids, call.keywords["expert_map"])
    live = weights.double().masked_fill(local < 0, 0.0)
    # An un-normalised router would hand over part of each weight: another share for each token.
    share = torch.linspace(0.35, 0.75, len(live), dtype=torch.float64, device=live.device)[:, None]
    return Parts(hidden.double(), gate_up, down, live, local, call.keywords["activation"], live * share)


def experts(layer: Parts) -> Wrong:
    """Name -> wrong [T, H] in fp64."""
    live = layer.ids >= 0
    if not bool(live.any()) or not layer.hidden_states.numel():
        return {}
    gate, up = layer.halves()
    hidden = activate(gate, layer.activation) * up
    other = "gelu_tanh" if layer.activation == "silu" else "silu"
    changed = {
        "other_activation": activate(gate, other) * up,
        "gate_up_swapped": activate(up, layer.activation) * gate,
        "last_16_of_I_dropped": without_last(hidden, 16),
        "last_of_I_dropped": without_last(hidden, 1),
    }
    slots, *others = layer.outputs(torch.stack([hidden, *changed.values()]))  # the weights are widened once for all
    value = _combined(layer.weights, slots)
    found = common(value) | {"renormalisation_flipped": _combined(layer.flipped, slots)}
    found |= {name: _combined(layer.weights, of) for name, of in zip(changed, others, strict=True)}
    if bool(live[:, -1].any()):
        found["last_slot_dropped"] = _combined(layer.weights[:, :-1], slots[:, :-1])
    if layer.ids.shape[1] > 1:
        flat = live.double() * (layer.weights.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1))
        if not torch.allclose(flat, layer.weights):  # one live slot a token: flat already
            found["flat_weights"] = _combined(flat, slots)
    if len(layer.down) > 1:
        found["one_token_to_wrong_expert"] = _rerouted(layer, value, slots)
    return {name: found[name] for name in NAMES if name in found}


def _combined(weights: Tensor, slots: Tensor) -> Tensor:
    return (weights[..., None] * slots).sum(1)


def _rerouted(layer: Parts, value: Tensor, slots: Tensor) -> Tensor:
    """One slot of one token in the middle goes to the next expert."""
    places = (layer.ids >= 0).nonzero()
    token, slot = places[len(places) // 2].tolist()
    ids = torch.full_like(layer.ids, -1)
    ids[token, slot] = (layer.ids[token, slot] + 1) % len(layer.down)
    alone = Parts(layer.hidden_states, layer.gate_up, layer.down, layer.weights, ids, layer.activation, layer.flipped)
    gate, up = alone.halves()
    moved = alone.outputs(activate(gate, layer.activation) * up)[token, slot]
    out = value.clone()
    out[token] += layer.weights[token, slot] * (moved - slots[token, slot])
    return out
