"""Right grouped linears as strangers write them."""

import torch


def loop(x, weight, group_sizes, *, bias=None):
    """One product per group, fp32 sums."""
    parts = []
    for e, rows in enumerate(x.split(group_sizes.tolist())):
        y = rows.float() @ weight[e].float().mT
        parts.append(y if bias is None else y + bias[e].float())
    return torch.cat(parts).to(x.dtype)


def bias_in_model_dtype(x, weight, group_sizes, *, bias=None):
    """The product is rounded, and the bias added in the model's dtype."""
    out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for e, n in enumerate(group_sizes.tolist()):
        y = (x[start : start + n].float() @ weight[e].float().mT).to(x.dtype)
        out[start : start + n] = y if bias is None else y + bias[e]
        start += n
    return out


def gathered(x, weight, group_sizes, *, bias=None):
    """Each row with its own copy of the weight, in one batched product."""
    owner = torch.repeat_interleave(torch.arange(weight.shape[0], device=x.device), group_sizes.to(x.device).long())
    y = torch.bmm(weight[owner].float(), x.float().unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        y = y + bias[owner].float()
    return y.to(x.dtype)


def bias_first_k_backwards(x, weight, group_sizes, *, bias=None):
    """The accumulator starts from the bias; K runs from its end in chunks of 32."""
    owner = torch.bucketize(
        torch.arange(x.shape[0], device=x.device), group_sizes.to(x.device).long().cumsum(0), right=True
    )
    acc = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float32, device=x.device)
    for e in owner.unique().tolist():
        rows = (owner == e).nonzero().flatten()
        total = torch.zeros(rows.numel(), weight.shape[1], dtype=torch.float32, device=x.device)
        if bias is not None:
            total = total + bias[e].float()
        for start in reversed(range(0, x.shape[1], 32)):
            total = total + x[rows, start : start + 32].float() @ weight[e, :, start : start + 32].float().mT
        acc[rows] = total
    return acc.to(x.dtype)


def needs_whole_16_bytes(x, weight, group_sizes, *, bias=None):
    """A kernel with vector loads that refuses rows it cannot load."""
    if x.shape[1] * x.element_size() % 16:
        raise NotImplementedError("rows must be a multiple of 16 bytes")
    return loop(x, weight, group_sizes, bias=bias)


def double(x, weight, group_sizes, *, bias=None):
    """fp64 inside."""
    out, start = x.new_zeros(x.shape[0], weight.shape[1], dtype=torch.float64), 0
    for e, n in enumerate(group_sizes.tolist()):
        out[start : start + n] = x[start : start + n].double() @ weight[e].double().mT
        if bias is not None:
            out[start : start + n] += bias[e].double()
        start += n
    return out.to(x.dtype)
