"""The steps of the stage `grouped_linear` as an implementation with other roundings has them."""

import torch

from moe_harness.harness.core.emulation import product_in
from moe_harness.harness.stages.grouped_linear.faults._steps import Steps


def other_steps(dtype: torch.dtype) -> Steps:
    """The steps, rounded to `dtype` where the right ones are not."""
    return Steps(matmul=product_in(dtype))
