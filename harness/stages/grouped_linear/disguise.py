"""The steps of the stage `grouped_linear` as an implementation with other roundings has them."""

from collections.abc import Callable
from typing import Any

import torch

from moe_harness.harness.core.emulation import product_in
from moe_harness.harness.stages.grouped_linear.faults import products as right

RUN = right  # its `run` is the right implementation that the faults of the stage change


def other_steps(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Steps by name, rounded to `dtype` where the right ones are not."""
    return {"matmul": product_in(dtype)}
