"""Right normalisations as strangers write them."""

import torch


def as_the_model_code(x, weight, *, eps, residual=None):
    """transformers' order: normalised in fp32, rounded, then the weight in the model's dtype."""
    total = x if residual is None else x + residual
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = weight * wide.to(x.dtype)
    return out if residual is None else (out, total)


def sum_kept_in_fp32(x, weight, *, eps, residual=None):
    """The sum is normalised before it is rounded."""
    total = x.float() if residual is None else x.float() + residual.float()
    out = total / torch.sqrt(total.square().sum(-1, keepdim=True) / x.shape[-1] + eps) * weight.float()
    return out.to(x.dtype) if residual is None else (out.to(x.dtype), total.to(x.dtype))


sum_kept_in_fp32.rounds = ()


def torch_function(x, weight, *, eps, residual=None):
    """torch's own, in fp32."""
    total = x if residual is None else x + residual
    out = torch.nn.functional.rms_norm(total.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype).contiguous()
    return out if residual is None else (out, total)


def in_chunks(x, weight, *, eps, residual=None):
    """Squares added in runs of 64, one after the other."""
    total = (x if residual is None else x + residual).contiguous()
    wide = total.float()
    squares = torch.zeros(*x.shape[:-1], 1)
    for start in range(0, x.shape[-1], 64):
        squares = squares + wide[..., start : start + 64].square().sum(-1, keepdim=True)
    out = (wide * (weight.float() * torch.rsqrt(squares * (1.0 / max(1, x.shape[-1])) + eps))).to(x.dtype)
    return out if residual is None else (out, total)


def without_residual(x, weight, *, eps):
    """A kernel that has no residual: those cases are unsupported."""
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)
