"""Where a model goes wrong: every layer alone, on the residual stream of the reference, then the halves of a wrong one.

Errors do not pile up, since no layer sees what the one before it made: of a fault in one layer that layer is red and
those after it stay green.  A model that has `half(i, "attention" | "mlp", hidden_states)` beside the contract's `layer`
is asked for the halves of its first wrong layer.  In that one, changes of the reference that explain the result are
looked for too: the one whose output the model's is within rounding is what it does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.noise import NoiseBound, noise_bound
from moe_harness.reference.model import HALVES, Model, State

Weights = dict[str, Tensor]
FAR = 2.0**8  # roundings: more than a layer's add up to, and a cheap first look only


@dataclass(frozen=True)
class Judged:
    """One layer, or half of one, of one model: the largest |z| of what could be judged, and how much that was."""

    layer: int
    worst: float
    share: float

    @property
    def wrong(self) -> bool:
        return not self.worst <= bounds.max_limit()


@dataclass
class Location:
    """What is known of a model: all layers, and of the first wrong one its halves and what explains it."""

    layers: list[Judged]
    halves: dict[str, Judged] = field(default_factory=dict)
    explained: list[str] = field(default_factory=list)

    @property
    def first(self) -> Judged | None:
        return next((judged for judged in self.layers if judged.wrong), None)


@torch.no_grad()
def bisect(
    model: Any, reference: Model, ids: Tensor, dtype: torch.dtype, device: str,
    progress: Callable[[Judged], None] = lambda judged: None,
) -> Location:  # fmt: skip
    """Judge every layer of `model` on the stream that the reference makes of ids [B, L].

    Raises:
        NotImplementedError: the model has no `layer`.
    """
    if not hasattr(model, "layer"):
        raise NotImplementedError("the model has no method `layer(i, hidden_states)`, so no layer can be run alone")
    found, hidden, entered = Location([]), reference.embed(ids), None
    state = State()
    for i in range(reference.layers):
        enters = hidden.to(dtype)
        bound = noise_bound(reference, partial(reference.layer, i, enters.double()), dtype)
        judged = _judged(i, bound, model.layer(i, enters.to(device)).cpu())
        found.layers.append(judged)
        progress(judged)
        if judged.wrong and entered is None:
            entered = enters
        hidden = reference.layer(i, hidden, state)
    if found.first is not None and entered is not None:
        i = found.first.layer
        found.halves = _halves(model, reference, i, entered, dtype, device)
        found.explained = list(_explanations(model.layer(i, entered.to(device)).cpu(), reference, i, entered, dtype))
    return found


def _judged(layer: int, bound: NoiseBound, result: Tensor) -> Judged:
    """A result of another shape is as wrong as can be; so is a NaN."""
    if result.shape != bound.value.shape or not bool(bound.routed.any()):
        return Judged(layer, float("inf"), float(bound.routed.double().mean()))
    z = bound.z(result)[bound.routed].abs().nan_to_num(float("inf"))
    return Judged(layer, float(z.max()), float(bound.routed.double().mean()))


def _halves(model: Any, reference: Model, i: int, enters: Tensor, dtype: torch.dtype, device: str) -> dict[str, Judged]:
    if not hasattr(model, "half"):
        return {}
    found = {}
    for name in HALVES:
        bound = noise_bound(reference, partial(getattr(reference, name), i, enters.double()), dtype)
        found[name] = _judged(i, bound, model.half(i, name, enters.to(device)).cpu())
        enters = getattr(reference, name)(i, enters.double(), State()).to(dtype)
    return found


def _explanations(result: Tensor, reference: Model, i: int, enters: Tensor, dtype: torch.dtype) -> Iterator[str]:
    """Changes of layer i that the result is within rounding of."""
    names = [name for name in reference.weights if name.startswith(f"model.layers.{i}.")]
    held = {name: reference.weights[name] for name in names}
    for what, change in EXPLANATIONS.items():
        try:
            config, weights = change(dict(reference.config), dict(held))
            changed = Model(config, weights)
            near = result.shape == enters.shape and _near(result, changed.layer(i, enters.double(), State()), dtype)
            bound = noise_bound(changed, partial(changed.layer, i, enters.double()), dtype) if near else None
        except (KeyError, ValueError, RuntimeError, IndexError):
            continue  # this layer has nothing of the kind
        if bound is not None and not _judged(i, bound, result).wrong:
            yield what


def _near(result: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a bound is worth its dozen runs: in the mean no further away than a few hundred roundings."""
    error = (result.double() - value).square().mean().sqrt()
    return bool(error <= FAR * torch.finfo(dtype).eps * value.square().mean().sqrt())


def _swapped(first: str, second: str) -> Callable[[dict, Weights], tuple[dict, Weights]]:
    rename = {first: second, second: first}

    def change(config: dict, held: Weights) -> tuple[dict, Weights]:
        if not any(first in name for name in held):
            raise KeyError(first)
        return config, {next((n.replace(a, b) for a, b in rename.items() if a in n), n): w for n, w in held.items()}

    return change


def _zeroed(part: str) -> Callable[[dict, Weights], tuple[dict, Weights]]:
    def change(config: dict, held: Weights) -> tuple[dict, Weights]:
        if not any(part in name for name in held):
            raise KeyError(part)
        return config, {n: torch.zeros_like(w) if part in n else w for n, w in held.items()}

    return change


def _ones(part: str) -> Callable[[dict, Weights], tuple[dict, Weights]]:
    def change(config: dict, held: Weights) -> tuple[dict, Weights]:
        if not any(part in name for name in held):
            raise KeyError(part)
        return config, {n: torch.ones_like(w) if part in n else w for n, w in held.items()}

    return change


def _keys(**changes: Callable[[Any], Any]) -> Callable[[dict, Weights], tuple[dict, Weights]]:
    return lambda config, held: (config | {key: change(config[key]) for key, change in changes.items()}, held)


def _without(*parts: str) -> Callable[[dict, Weights], tuple[dict, Weights]]:
    def change(config: dict, held: Weights) -> tuple[dict, Weights]:
        kept = {n: w for n, w in held.items() if not any(part in n for part in parts)}
        if len(kept) == len(held):
            raise KeyError(parts)
        return config, kept

    return change


# Half layer, stage, and what was done instead.
EXPLANATIONS: dict[str, Callable[[dict, Weights], tuple[dict, Weights]]] = {
    "attention: input norm: its weight is taken as 1": _ones(".input_layernorm."),
    "attention: input norm: the weight of the mlp's norm": _swapped(".input_layernorm.", ".post_attention_layernorm."),
    "attention: qkv: q's and k's norms swapped": _swapped(".q_norm.", ".k_norm."),
    "attention: qkv: q and k are not normalised": _without(".q_norm.", ".k_norm."),
    "attention: qkv: k and v swapped": _swapped(".k_proj.", ".v_proj."),
    "attention: qkv: biases left out": _without("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    "attention: rope: theta 10000": _keys(rope_theta=lambda theta: 10000.0),
    "attention: rope: theta 1000000": _keys(rope_theta=lambda theta: 1000000.0),
    "attention: rope: yarn's scaling left out": _keys(rope_scaling=lambda scaling: None),
    "attention: latent: its norm's weight is taken as 1": _ones(".kv_a_layernorm."),
    "attention: o_proj: nothing is added": _zeroed(".o_proj."),
    "mlp: router: renormalised where it should not be, or the other way round": _keys(norm_topk_prob=lambda b: not b),
    "mlp: router: one expert too few": _keys(num_experts_per_tok=lambda k: k - 1),
    "mlp: router: one expert too many": _keys(num_experts_per_tok=lambda k: k + 1),
    "mlp: router: the limit of groups ignored": _keys(topk_method=lambda method: "greedy"),
    "mlp: router: routed_scaling_factor left out": _keys(routed_scaling_factor=lambda factor: 1.0),
    "mlp: experts: gate and up swapped": _swapped(".gate_proj.", ".up_proj."),
    "mlp: experts: the first two swapped": _swapped(".experts.0.", ".experts.1."),
    "mlp: experts: gelu for silu": _keys(hidden_act=lambda act: "gelu_pytorch_tanh"),
    "mlp: experts: nothing is added": _zeroed(".experts."),
    "mlp: shared expert: left out": _without(".shared_expert"),
}
