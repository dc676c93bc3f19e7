"""A fault behind another implementation's rounding: what the diagnosis is measured on.

The right steps that a fault is built from are given to it as ones that round at every place the contract permits:
products and activations stored in the model's dtype, the sum over slots running backwards in that dtype; for fp32
inputs all arithmetic in fp64, rounded once.  The fault itself stays as it is, and its bits are others than the
catalogue's.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_harness.harness.core.catalogue import Fault
from moe_harness.harness.core.registry import stage_part


def hidden(fault: Fault) -> Callable[..., Any]:
    """An implementation that has the fault and rounds unlike the catalogue's."""

    def implementation(*args: Any, **keywords: Any) -> Any:
        steps = _other_steps(fault.stage, args[0].dtype)
        if fault.part is not None:
            steps = steps._replace(part=_other_steps(fault.part.stage, args[0].dtype))
        return fault.function(*args, **keywords, **({} if steps is None else {"steps": steps}))

    for name in ("dtypes", "devices"):
        if hasattr(fault.function, name):
            setattr(implementation, name, getattr(fault.function, name))
    return implementation


def _other_steps(stage: str, dtype: torch.dtype) -> Any:
    """The `Steps` of a stage in other roundings; None where its faults are built from none."""
    module = stage_part(stage, "disguise")
    return None if module is None else module.other_steps(dtype)
