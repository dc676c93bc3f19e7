r"""One linear layer per expert over rows sorted by expert.

    y[s] = weight[e] @ x[s] (+ bias[e])      e: the group that row s falls into

The first group_sizes[0] rows belong to expert 0, the next group_sizes[1] to expert 1, and so on.
"""

import torch
from torch import Tensor


def row_experts(group_sizes: Tensor) -> Tensor:
    """The expert of each row, [S]: 0 repeated group_sizes[0] times, then 1, ..."""
    return torch.arange(len(group_sizes), device=group_sizes.device).repeat_interleave(group_sizes.long())


def grouped_linear(x: Tensor, weight: Tensor, group_sizes: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Apply expert e's weight to its run of rows.

    Args:
        x: [S, K]; all arithmetic is done in its dtype, so pass fp64 for an oracle.
        weight: [E, N, K].
        group_sizes: int [E], summing to S; zeros are ordinary.
        bias: [E, N].

    Returns:
        [S, N] in the dtype of x.
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        if size == 0:
            continue
        rows = x[start : start + size] @ weight[expert].to(x.dtype).T
        out[start : start + size] = rows if bias is None else rows + bias[expert].to(x.dtype)
        start += size
    return out
