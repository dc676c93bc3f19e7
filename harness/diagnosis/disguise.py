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

from moe_harness.harness.core import catalogue
from moe_harness.harness.core.catalogue import Fault
from moe_harness.harness.core.folders import stage_part


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
    module = stage_part(stage, "disguise")
    if module is None:
        yield
        return
    steps, home = module.other_steps(dtype), module.RUN
    modules = [sys.modules[name] for name in catalogue.modules() if name in sys.modules]
    originals: list[tuple[Any, str, Any]] = []
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
