"""The stage `rope_cache` in Triton: queries and keys normalised and rotated, keys and values put in the paged cache.

    each head h of q and k:  h = q_norm * h / sqrt(mean(h^2) + eps), where there is a norm
    then, with a = position * theta^(-2i/D):  first half * cos a - second half * sin a, second * cos a + first * sin a

- Token t is written at page slots[t] // page, row slots[t] % page; a slot of -1 writes nothing.
- The two caches are the only arguments that change, and there in the slots only; any strides, those of a cache in
  [P, heads, page, D] among them.
- Returns the rotated queries as a new tensor.  Positions reach 100,000: fp32 loses the angle there.
- What you cannot do yet: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage rope_cache --impl FILE:rope_cache --device cuda
    TRITON_INTERPRET=1 moe-harness check --stage rope_cache --impl FILE:rope_cache   (without a GPU, slowly)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(x, weight, cos, sin, out, heads, half, eps, x_t, x_h, x_d, w_d, NORM: tl.constexpr, TILE: tl.constexpr):
    """One head of one token, its halves side by side; fp32."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, TILE)
    here = at < half
    source = x + token * x_t + head * x_h + at * x_d
    first = tl.load(source, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + half * x_d, mask=here, other=0.0).to(tl.float32)
    if NORM:
        root = tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * half) + eps)
        first = first / root * tl.load(weight + at * w_d, mask=here, other=0.0).to(tl.float32)
        second = second / root * tl.load(weight + (half + at) * w_d, mask=here, other=0.0).to(tl.float32)
    c = tl.load(cos + token * half + at, mask=here, other=0.0)
    s = tl.load(sin + token * half + at, mask=here, other=0.0)
    to = out + (token * heads + head) * 2 * half + at
    tl.store(to, first * c - second * s, mask=here)
    tl.store(to + half, second * c + first * s, mask=here)


@triton.jit
def _write(x, slots, cache, page, D, x_t, x_h, x_d, c_p, c_r, c_h, c_d, TILE: tl.constexpr):
    """One head of one token to its slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    at = tl.arange(0, TILE)
    if slot >= 0:
        value = tl.load(x + token * x_t + head * x_h + at * x_d, mask=at < D)
        tl.store(cache + slot // page * c_p + slot % page * c_r + head * c_h + at * c_d, value, mask=at < D)


def rotated(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Each head normalised, where there is a weight, and rotated: [T, heads, D] in the dtype of x."""
    T, heads, D = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    scale, stride = (x, 0) if weight is None else (weight, weight.stride(0))
    if T and heads:
        _rotate[T, heads](x, scale, cos, sin, out, heads, D // 2, float(eps), *x.stride(), stride, weight is not None,
                          triton.next_power_of_2(D // 2))  # fmt: skip
    return out.to(x.dtype)  # to be stored so by the kernel; the interpreter cuts bf16 off instead of rounding


def rope_cache(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hk, D]
    v: Tensor,  # [T, Hk, D]
    positions: Tensor,  # int [T]
    slots: Tensor,  # int [T]
    key_cache: Tensor,  # [P, page, Hk, D], written
    value_cache: Tensor,  # [P, page, Hk, D], written
    *,
    q_norm: Tensor | None = None,  # [D]
    k_norm: Tensor | None = None,  # [D]
    eps: float = 1e-6,
    theta: float,
) -> Tensor:  # [T, Hq, D]
    T, heads, D = k.shape
    powers = torch.arange(0, D, 2, dtype=torch.float64, device=q.device) / D
    angles = positions.double()[:, None] * theta**-powers
    cos, sin = angles.cos().float(), angles.sin().float()
    at = slots.contiguous()
    for rows, cache in ((rotated(k, k_norm, cos, sin, eps), key_cache), (v, value_cache)):
        if T:
            _write[T, heads](rows, at, cache, cache.shape[1], D, *rows.stride(), *cache.stride(),
                             triton.next_power_of_2(D))  # fmt: skip
    return rotated(q, q_norm, cos, sin, eps)


# What it promises; optional, and what is promised is judged.
rope_cache.rounds = ()
rope_cache.deterministic = True
