"""A fault behind another implementation's rounding: what the diagnosis is measured on.

The right steps that a fault is built from are replaced by ones that round at every place the contract permits: products
and activations stored in the model's dtype, the sum over slots running backwards in that dtype; for fp32 inputs all
arithmetic in fp64, rounded once.  The fault itself stays as it is, and its bits are others than the catalogue's.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import catalogue
from moe_harness.harness.core.catalogue import Fault
from moe_harness.harness.core.emulation import wide

RIGHT_STEPS = {  # the modules whose `run` is the right implementation that a stage's faults change
    "experts": "experts.faults.slots",
    "router": "router.faults.weights",
    "grouped_linear": "grouped_linear.faults.products",
    "shared_expert_gate": "shared_expert_gate.faults.gates",
    "moe_block": "moe_block.faults.blocks",
}


def hidden(fault: Fault) -> Callable[..., Any]:
    """An implementation that has the fault and rounds unlike the catalogue's."""

    def implementation(*args: Any, **keywords: Any) -> Any:
        stages = [fault.stage] + ([fault.part.stage] if fault.part else [])
        with ExitStack() as replaced:
            for stage in stages:
                replaced.enter_context(_other_steps(stage, args[0].dtype))
            return fault.function(*args, **keywords)

    for name in ("dtypes", "devices"):
        if hasattr(fault.function, name):
            setattr(implementation, name, getattr(fault.function, name))
    return implementation


@contextmanager
def _other_steps(stage: str, dtype: torch.dtype) -> Iterator[None]:
    """Replace the steps by name wherever a module of faults took them, and in the defaults of the stage's `run`."""
    steps = _STEPS[stage](dtype)
    modules = [sys.modules[name] for name in catalogue.modules() if name in sys.modules]
    originals: list[tuple[Any, str, Any]] = []
    home = sys.modules[f"moe_harness.harness.stages.{RIGHT_STEPS[stage]}"]
    kept = dict(home.run.__kwdefaults__)
    right = {name: getattr(home, name) for name in steps}
    try:
        for key, value in kept.items():
            home.run.__kwdefaults__[key] = next((steps[n] for n in steps if value is right[n]), value)
        for module in modules:
            for name, step in steps.items():
                if getattr(module, name, None) is right[name]:
                    originals.append((module, name, right[name]))
                    setattr(module, name, step)
        yield
    finally:
        home.run.__kwdefaults__.update(kept)
        for module, name, step in originals:
            setattr(module, name, step)


def _product(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    def matmul(rows: Tensor, weight: Tensor) -> Tensor:
        total = rows.double() @ weight.double().T
        return total.to(dtype).to(wide(rows))

    return matmul


def _of_experts(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    from moe_harness.harness.stages.experts.faults.slots import act, live

    def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return (act(gate.double(), activation) * up.double()).to(dtype).to(gate.dtype)

    def combine(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weighted = live(topk_weights, ids, slots.dtype)[..., None] * slots
        total = weighted.new_zeros(len(ids), slots.shape[-1], dtype=dtype)
        for slot in weighted.unbind(1)[::-1]:
            total = (total.double() + slot.to(dtype).double()).to(dtype)
        return total.to(slots.dtype)

    return {"matmul": _product(dtype), "gated": gated, "combine": combine}


def _of_grouped_linear(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    return {"matmul": _product(dtype)}


def _of_router(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    def score(logits: Tensor, scoring: str) -> Tensor:
        kind, logits = wide(logits), logits.double()
        return (logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()).to(kind)

    def weigh(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Tensor:
        weights = scores.gather(-1, ids).double()
        total = weights.flip(-1).sum(-1, keepdim=True) if renormalize else 1.0
        return (weights * scale / total).to(scores.dtype)

    return {"score": score, "weigh": weigh}


def _of_gate(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    def dot(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        return (hidden_states.double() @ gate_weight.double().T).to(dtype).to(wide(hidden_states))

    return {"dot": dot}


def _of_moe_block(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    from moe_harness.harness.stages.moe_block.faults import blocks

    right_routed, right_shared = blocks.routed, blocks.shared

    def routed(x: Tensor, weights: Any, routing: Any, config: Any) -> Tensor:
        topk_weights, ids = routing
        found = right_routed(x.double(), weights, (topk_weights.to(dtype).double(), ids), config)
        return found.to(dtype).to(x.dtype)

    def shared(x: Tensor, weights: Any, config: Any) -> Tensor:
        return right_shared(x, weights, config).to(dtype).to(x.dtype)

    return {"routed": routed, "shared": shared}


_STEPS = {
    "experts": _of_experts,
    "grouped_linear": _of_grouped_linear,
    "router": _of_router,
    "shared_expert_gate": _of_gate,
    "moe_block": _of_moe_block,
}
