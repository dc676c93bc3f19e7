"""Standard wrong outputs of a stage, made from the reference alone: what any judgement worth its name rejects.

Each is what a plausible mistake returns on the data of one call, in fp64; a caller rounds it to the output dtype.  They
guard the data (`harness.run.data_power`: a case on which one of them passes cannot judge) and measure other people's
tolerances (`harness.proof.audit`).  One that cannot differ for a call's shape and flags (no slot to drop when nothing
is routed) is left out; one that merely happens not to differ on the data is kept, for that is what the power
check must find.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.call import Call
from moe_harness.reference import moe_block as block
from moe_harness.reference import router as routing
from moe_harness.reference.experts import activate, local_ids, routed_rows
from moe_harness.reference.experts import experts as routed_experts
from moe_harness.reference.grouped_linear import grouped_linear, row_experts

Wrong = dict[str, Any]

EXPERTS = (
    "all_zeros", "doubled", "other_activation", "gate_up_swapped", "last_slot_dropped", "flat_weights",
    "renormalisation_flipped", "last_16_of_I_dropped", "last_of_I_dropped", "one_row_zeroed", "one_element_off",
    "one_token_to_wrong_expert",
)  # fmt: skip
GROUPED_LINEAR = (
    "all_zeros", "doubled", "bias_dropped", "bias_of_next_expert", "groups_shifted_by_a_row", "experts_rotated",
    "last_16_of_K_dropped", "last_of_K_dropped", "one_row_zeroed", "one_element_off", "one_row_to_wrong_expert",
)  # fmt: skip
SHARED_EXPERT_GATE = (
    "all_zeros", "doubled", "ungated", "gate_complemented", "gate_without_sigmoid", "gate_of_next_row",
    "last_16_of_H_dropped", "last_of_H_dropped", "one_row_zeroed", "one_element_off",
)  # fmt: skip
MOE_BLOCK = (
    "all_zeros", "doubled", "shared_expert_dropped", "routed_part_dropped", "shared_expert_ungated", "flat_weights",
    "row_of_next_token", "one_row_zeroed", "one_element_off",
)  # fmt: skip
ROUTER = (
    "weights_zero", "weights_doubled", "flat_weights", "renormalisation_flipped", "other_scoring", "weights_reversed",
    "scaling_dropped", "bias_dropped", "bias_in_weights", "groups_ignored", "last_choice_next_best", "one_weight_off",
    "first_experts_chosen", "row_of_next_token",
)  # fmt: skip


def wrong_outputs(call: Call) -> Wrong:
    """Name -> wrong output of the call's stage: a tensor, or (topk_weights, topk_ids) for the router.

    Raises:
        ValueError: a stage without standard wrong outputs.
    """
    maker = _MAKERS.get(call.case.stage)
    if maker is None:
        raise ValueError(f"stage is {call.case.stage!r}, but should be one of {', '.join(_MAKERS)}")
    return maker(call)


def common(value: Tensor) -> Wrong:
    """Mistakes that need only the right value [rows, columns]."""
    if not value.numel():
        return {}
    filled = value.any(-1).nonzero()[:, 0].tolist() or [0]  # a row of zeros cannot be lost
    row = filled[len(filled) // 2]
    zeroed, off = value.clone(), value.clone()
    zeroed[row] = 0.0
    off[row, value.shape[-1] // 2] += value.abs().max()
    return {
        "all_zeros": torch.zeros_like(value),
        "doubled": 2 * value,
        "one_row_zeroed": zeroed,
        "one_element_off": off,
    }


# -------------------------------------------------------------------------------------------------------------- experts


@dataclass
class Layer:
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


def layer_of(call: Call) -> Layer:
    """The layer of a call of the stage `experts`."""
    hidden, gate_up, down, weights, ids = call.args.values()
    local = local_ids(ids, call.keywords["expert_map"])
    live = weights.double().masked_fill(local < 0, 0.0)
    # An un-normalised router would hand over part of each weight: another share for each token.
    share = torch.linspace(0.35, 0.75, len(live), dtype=torch.float64, device=live.device)[:, None]
    return Layer(hidden.double(), gate_up, down, live, local, call.keywords["activation"], live * share)


def experts(layer: Layer) -> Wrong:
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
        "last_16_of_I_dropped": _without_last(hidden, 16),
        "last_of_I_dropped": _without_last(hidden, 1),
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
    return {name: found[name] for name in EXPERTS if name in found}


def _combined(weights: Tensor, slots: Tensor) -> Tensor:
    return (weights[..., None] * slots).sum(1)


def _without_last(hidden: Tensor, columns: int) -> Tensor:
    kept = hidden.clone()
    kept[..., -columns:] = 0.0
    return kept


def _rerouted(layer: Layer, value: Tensor, slots: Tensor) -> Tensor:
    """One slot of one token in the middle goes to the next expert."""
    places = (layer.ids >= 0).nonzero()
    token, slot = places[len(places) // 2].tolist()
    ids = torch.full_like(layer.ids, -1)
    ids[token, slot] = (layer.ids[token, slot] + 1) % len(layer.down)
    alone = Layer(layer.hidden_states, layer.gate_up, layer.down, layer.weights, ids, layer.activation, layer.flipped)
    gate, up = alone.halves()
    moved = alone.outputs(activate(gate, layer.activation) * up)[token, slot]
    out = value.clone()
    out[token] += layer.weights[token, slot] * (moved - slots[token, slot])
    return out


# ------------------------------------------------------------------------------------------------------- grouped_linear


def linear(x: Tensor, weight: Tensor, sizes: Tensor, *, bias: Tensor | None) -> Wrong:
    """Name -> wrong [S, N] in fp64."""
    rows = x.double()
    if not rows.numel() or not weight.numel():
        return {}

    def run(rows: Tensor = rows, sizes: Tensor = sizes, weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
        return grouped_linear(rows, weight, sizes, bias=bias)

    value = run()
    found = common(value)
    found["last_16_of_K_dropped"] = run(rows=_without_last(rows, 16))
    found["last_of_K_dropped"] = run(rows=_without_last(rows, 1))
    if bias is not None:
        found["bias_dropped"] = run(bias=None)
    if len(weight) > 1:
        found |= _misgrouped(run, value, rows, weight, sizes, bias)
    return {name: found[name] for name in GROUPED_LINEAR if name in found}


def _misgrouped(
    run: Callable, value: Tensor, rows: Tensor, weight: Tensor, sizes: Tensor, bias: Tensor | None
) -> Wrong:
    """Rows that meet another expert than theirs."""
    owners = row_experts(sizes)
    found: Wrong = {"experts_rotated": run(weight=weight.roll(1, 0), bias=None if bias is None else bias.roll(1, 0))}
    if bias is not None:
        found["bias_of_next_expert"] = run(bias=bias.roll(-1, 0))
    row = len(rows) // 2
    other = (int(owners[row]) + 1) % len(weight)
    found["one_row_to_wrong_expert"] = value.clone()
    moved = rows[row] @ weight[other].double().T
    found["one_row_to_wrong_expert"][row] = moved if bias is None else moved + bias[other].double()
    if bool((owners[1:] != owners[:-1]).any()):
        shifted = torch.cat([owners[:1], owners[:-1]])  # every group begins a row late
        found["groups_shifted_by_a_row"] = run(sizes=torch.bincount(shifted, minlength=len(weight)))
    return found


# --------------------------------------------------------------------------------------------------- shared_expert_gate


def gate(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Wrong:
    """Name -> wrong [rows, D] in fp64; leading dimensions are flattened."""
    shared = shared_output.double().reshape(-1, shared_output.shape[-1])
    hidden = hidden_states.double().reshape(-1, hidden_states.shape[-1])
    weight = gate_weight.double()
    if not shared.numel():
        return {}
    logit = hidden @ weight.T
    scale = logit.sigmoid()
    closed = scale < torch.finfo(torch.float32).tiny  # zeros are right there
    found = common((scale * shared).masked_fill(closed, 0.0)) | {
        "ungated": shared,
        "gate_complemented": (1 - scale) * shared,
        "gate_without_sigmoid": logit * shared,
        "last_16_of_H_dropped": (_without_last(hidden, 16) @ weight.T).sigmoid() * shared,
        "last_of_H_dropped": (_without_last(hidden, 1) @ weight.T).sigmoid() * shared,
    }
    if len(shared) > 1:
        found["gate_of_next_row"] = scale.roll(1, 0) * shared
    return {name: found[name] for name in SHARED_EXPERT_GATE if name in found}


# ------------------------------------------------------------------------------------------------------------ moe_block


def moe_block(hidden_states: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> Wrong:
    """Name -> wrong [T, H] in fp64."""
    x = hidden_states.double()
    if not x.numel():
        return {}
    wide = {name: weight.double() for name, weight in weights.items() if not name.startswith("experts.")}
    gate_up, down, act = weights["experts.gate_up_proj"], weights["experts.down_proj"], block.activation(config)
    shares, ids = block.routing(block.router_logits(x, wide, config), wide, config)
    routed = routed_experts(x, gate_up, down, shares, ids, activation=act)
    shared = block.shared_expert(x, wide, config)
    value = routed if shared is None else routed + shared
    found = common(value)
    if shared is not None:
        found |= {"shared_expert_dropped": routed, "routed_part_dropped": shared}
    if "shared_expert_gate.weight" in wide:
        found["shared_expert_ungated"] = routed + block.gated_mlp(x, wide, "shared_expert", act)
    if len(x) > 1:
        found["row_of_next_token"] = value.roll(1, 0)
    if ids.shape[1] > 1:
        flat = shares.mean(-1, keepdim=True).expand_as(shares)
        found["flat_weights"] = value - routed + routed_experts(x, gate_up, down, flat, ids, activation=act)
    return {name: found[name] for name in MOE_BLOCK if name in found}


# --------------------------------------------------------------------------------------------------------------- router


def router(logits: Tensor, options: dict[str, Any]) -> Wrong:
    """Name -> wrong (topk_weights, topk_ids), weights in fp64."""
    logits = logits.double()
    if not logits.numel():
        return {}

    def run(logits: Tensor = logits, **changes: Any) -> tuple[Tensor, Tensor]:
        return routing.router(logits, **(options | changes))

    weights, ids = run()
    found: Wrong = {
        "weights_zero": (torch.zeros_like(weights), ids),
        "weights_doubled": (2 * weights, ids),
        "one_weight_off": (_one_off(weights), ids),
    }
    found |= _changed_weights(logits, options, weights, ids) | _changed_choice(run, logits, options, weights, ids)
    return {name: found[name] for name in ROUTER if name in found}


def _one_off(weights: Tensor) -> Tensor:
    off = weights.clone()
    off[len(off) // 2, 0] *= 1.01
    return off


def _changed_weights(logits: Tensor, options: dict[str, Any], weights: Tensor, ids: Tensor) -> Wrong:
    """The right experts with wrong weights."""
    experts, top_k, found = logits.shape[1], options["top_k"], {}
    scores = routing.expert_scores(logits, options["scoring"])
    keep = {"renormalize": options["renormalize"], "routed_scaling_factor": options["routed_scaling_factor"]}
    everything = options["scoring"] == "softmax" and top_k == experts  # their sum is 1 either way
    if not everything:
        flipped = keep | {"renormalize": not keep["renormalize"]}
        found["renormalisation_flipped"] = (routing.combine_weights(scores, ids, **flipped), ids)
    if top_k > 1:
        found["flat_weights"] = (weights.mean(-1, keepdim=True).expand_as(weights), ids)
        found["weights_reversed"] = (weights.flip(-1), ids)
    if top_k > 1 or not options["renormalize"]:
        other = "sigmoid" if options["scoring"] == "softmax" else "softmax"
        found["other_scoring"] = (routing.combine_weights(routing.expert_scores(logits, other), ids, **keep), ids)
    if options["routed_scaling_factor"] != 1.0:
        found["scaling_dropped"] = (weights / options["routed_scaling_factor"], ids)
    bias = options["correction_bias"]
    if bias is not None and bool(bias.any()) and (top_k > 1 or not options["renormalize"]):
        found["bias_in_weights"] = (routing.combine_weights(scores + bias.double(), ids, **keep), ids)
    return found


def _changed_choice(run: Callable, logits: Tensor, options: dict[str, Any], weights: Tensor, ids: Tensor) -> Wrong:
    """Other experts, with the weights that are right for them."""
    experts, top_k, found = logits.shape[1], options["top_k"], {}
    if top_k < experts:
        first = torch.arange(top_k, device=ids.device).expand_as(ids)
        found["first_experts_chosen"] = (_weights_for(logits, options, first), first)
    if len(logits) > 1 and top_k < experts:
        found["row_of_next_token"] = (weights.roll(1, 0), ids.roll(1, 0))
    bias, groups = options["correction_bias"], options["num_expert_group"]
    if top_k < experts and groups is None:
        further = run(top_k=top_k + 1)[1]
        chosen = torch.cat([further[:, : top_k - 1], further[:, top_k:]], dim=-1)
        found["last_choice_next_best"] = (_weights_for(logits, options, chosen), chosen)
    if bias is not None and top_k < experts and bool((bias != bias[0]).any()):
        found["bias_dropped"] = run(correction_bias=None)
    # Where a group's score is its largest, the best k experts are in the best k groups whatever is kept of the others.
    decisive = groups is not None and options["topk_group"] < (groups if bias is not None else min(groups, top_k))
    if decisive and top_k < experts:
        found["groups_ignored"] = run(num_expert_group=None, topk_group=None)
    return found


def _weights_for(logits: Tensor, options: dict[str, Any], ids: Tensor) -> Tensor:
    scores = routing.expert_scores(logits, options["scoring"])
    return routing.combine_weights(
        scores, ids, renormalize=options["renormalize"], routed_scaling_factor=options["routed_scaling_factor"]
    )


_MAKERS: dict[str, Callable[[Call], Wrong]] = {
    "experts": lambda call: experts(layer_of(call)),
    "grouped_linear": lambda call: linear(*call.args.values(), bias=call.keywords["bias"]),
    "shared_expert_gate": lambda call: gate(*call.args.values()),
    "moe_block": lambda call: moe_block(*call.args.values()),
    "router": lambda call: router(call.args["router_logits"], call.keywords),
}
