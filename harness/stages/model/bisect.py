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
from moe_harness.harness.stages.model.changes import IN_LAYERS
from moe_harness.harness.stages.model.noise import NoiseBound, noise_bound
from moe_harness.reference.model import HALVES, Model, State

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
        bound = noise_bound(reference, partial(reference.layer, i), enters.double(), dtype)
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
        bound = noise_bound(reference, partial(getattr(reference, name), i), enters.double(), dtype)
        found[name] = _judged(i, bound, model.half(i, name, enters.to(device)).cpu())
        enters = getattr(reference, name)(i, enters.double(), State()).to(dtype)
    return found


def _explanations(result: Tensor, reference: Model, i: int, enters: Tensor, dtype: torch.dtype) -> Iterator[str]:
    """Changes of layer i that the result is within rounding of."""
    names = [name for name in reference.weights if name.startswith(f"model.layers.{i}.")]
    held = {name: reference.weights[name] for name in names}
    for what, change in IN_LAYERS.items():
        try:
            changed = change(dict(reference.config), dict(held))
            near = result.shape == enters.shape and _near(result, changed.layer(i, enters.double(), State()), dtype)
            bound = noise_bound(changed, partial(changed.layer, i), enters.double(), dtype) if near else None
        except (KeyError, ValueError, RuntimeError, IndexError):
            continue  # this layer has nothing of the kind
        if bound is not None and not _judged(i, bound, result).wrong:
            yield what


def _near(result: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a bound is worth its dozen runs: in the mean no further away than a few hundred roundings."""
    error = (result.double() - value).square().mean().sqrt()
    return bool(error <= FAR * torch.finfo(dtype).eps * value.square().mean().sqrt())
