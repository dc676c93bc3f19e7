"""Right gates of the shared expert as strangers write them."""

import torch


def fp32_inside(x, gate_weight, shared):
    """fp32 throughout, one rounding."""
    gate = torch.sigmoid((x.float() * gate_weight.float().reshape(-1)).sum(-1, keepdim=True))
    return (gate * shared.float()).to(x.dtype)


def gate_in_model_dtype(x, gate_weight, shared):
    """As the model code does: the logit and the gate are rounded to the model's dtype."""
    logit = (x.float() @ gate_weight.float().mT).to(x.dtype)
    return torch.sigmoid(logit) * shared


def by_tanh(x, gate_weight, shared):
    """sigmoid as 0.5 * (1 + tanh(z / 2)) in fp64, where it keeps small gates."""
    z = x.double() @ gate_weight.double().mT
    return (0.5 * (1 + torch.tanh(z * 0.5)) * shared.double()).to(x.dtype)


def chunked_dot(x, gate_weight, shared):
    """The dot product in chunks of 64 added in order; rows flattened and restored."""
    rows, w = x.reshape(-1, x.shape[-1]).float(), gate_weight.float()[0]
    z = torch.zeros(rows.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, rows.shape[1], 64):
        z = z + rows[:, start : start + 64] @ w[start : start + 64]
    return (shared.float() * torch.sigmoid(z).reshape(*x.shape[:-1], 1)).to(x.dtype)


def two_dimensions_only(x, gate_weight, shared):
    """A kernel for [T, H] that refuses anything else."""
    if x.dim() != 2:
        raise ValueError(f"expected [T, H], got {tuple(x.shape)}")
    return (torch.sigmoid(torch.nn.functional.linear(x.float(), gate_weight.float())) * shared.float()).to(x.dtype)
