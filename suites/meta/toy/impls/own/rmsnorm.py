"""A right implementation and wrong ones."""

import torch

__all__ = ["rmsnorm", "mean_forgotten", "second_largest", "running_twice", "weight_written"]


def rmsnorm(x, weight, running, *, eps=1e-6):
    wide = x.float()
    running += 1
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype), x.argmax(-1, keepdim=True)


def mean_forgotten(x, weight, running, *, eps=1e-6):
    out, largest = rmsnorm(x, weight, running, eps=eps)
    return out / x.shape[-1] ** 0.5, largest


def second_largest(x, weight, running, *, eps=1e-6):
    out, _ = rmsnorm(x, weight, running, eps=eps)
    return out, x.topk(2, -1).indices[:, 1:]


def running_twice(x, weight, running, *, eps=1e-6):
    running += 1
    return rmsnorm(x, weight, running, eps=eps)


def weight_written(x, weight, running, *, eps=1e-6):
    found = rmsnorm(x, weight, running, eps=eps)
    weight.mul_(2)
    return found
