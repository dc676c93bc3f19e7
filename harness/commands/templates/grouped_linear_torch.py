"""The stage `grouped_linear`: a linear layer with one weight per expert.

Rows are sorted by expert: the first group_sizes[0] rows belong to expert 0, and so on; they sum to S.

    out[s] = weight[e] @ x[s] + bias[e]

- Zero-sized groups and S = 0 are ordinary; any strides; the products accumulate in at least fp32.
- The output is a new tensor in the dtype of x; no input is modified.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage grouped_linear --impl FILE:grouped_linear
"""

from torch import Tensor


def grouped_linear(
    x: Tensor,  # [S, K]
    weight: Tensor,  # [E, N, K]
    group_sizes: Tensor,  # int [E]
    *,
    bias: Tensor | None = None,  # [E, N]
) -> Tensor:  # [S, N]
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, size in enumerate(group_sizes.tolist()):
        rows = x[start : start + size].float() @ weight[expert].float().T
        out[start : start + size] = (rows if bias is None else rows + bias[expert].float()).to(x.dtype)
        start += size
    return out


# What it promises; optional, and what is promised is judged.
grouped_linear.deterministic = True
