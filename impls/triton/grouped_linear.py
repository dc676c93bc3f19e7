r"""One linear layer per expert over rows sorted by expert, in one launch.

    y[s] = weight[e] @ x[s] (+ bias[e])      e: the group that row s falls into

The kernel finds its rows from `group_sizes` on the device, so the call can be captured in a CUDA graph.  Accumulation
and bias are fp32; nothing is rounded before the output.  Strides of every operand are honoured.
"""

import torch
from torch import Tensor

from moe_harness.impls.launching import Repeated
from moe_harness.impls.triton import configs
from moe_harness.impls.triton._common import require
from moe_harness.impls.triton._linear import linear

__all__ = ["grouped_linear"]


def _check(x: Tensor, weight: Tensor, group_sizes: Tensor, bias: Tensor | None) -> None:
    """Refuse shapes and dtypes that do not fit together."""
    require(x, weight, *(() if bias is None else (bias,)))
    num_experts, columns, depth = weight.shape
    if x.shape[1] != depth or tuple(group_sizes.shape) != (num_experts,):
        raise ValueError(
            f"shapes are x {tuple(x.shape)}, weight {tuple(weight.shape)}, group_sizes {tuple(group_sizes.shape)}, "
            "but should be [S, K], [E, N, K], [E]"
        )
    if bias is not None and tuple(bias.shape) != (num_experts, columns):
        raise ValueError(f"bias is {tuple(bias.shape)}, but should be {(num_experts, columns)}")


def grouped_linear(x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Apply expert e's weight to its run of rows.

    Args:
        x: [S, K], fp32, fp16 or bf16.
        weight: [E, N, K], same dtype.
        group_sizes: int [E], summing to S, on the device; zeros are ordinary.
        bias: [E, N], same dtype.

    Returns:
        New [S, N] in the dtype of x.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    return _grouped_linear((x, weight, group_sizes, bias))


@Repeated
def _grouped_linear(x: Tensor, weight: Tensor, group_sizes: Tensor, bias: Tensor | None) -> Tensor:
    """`grouped_linear` with every argument by position."""
    _check(x, weight, group_sizes, bias)
    num_experts, columns, depth = weight.shape
    if x.shape[0] == 0 or weight.numel() == 0:
        return torch.zeros(x.shape[0], columns, dtype=x.dtype, device=x.device)
    shape = configs.Shape(num_experts, depth, columns, 1, x.element_size())
    tiling = configs.choose_linear(shape, x.shape[0], x.device)
    return linear(x, weight, group_sizes, tiling, x.shape[0], bias=bias)


grouped_linear.deterministic = True
grouped_linear.graph_capturable = True
grouped_linear.rounds = ()
