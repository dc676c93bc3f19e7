r"""From the projection to attention in one launch: heads normalised, rotated, keys and values written to their slots.

One program has one token and one key/value head with the query heads that share it.  Everything between load and store
is fp32.  The angle of plane i is position * theta^(-i / (D/2)): the power is taken with an exponent in two parts, since
one fp32 exponent of about 20 bits would leave the frequency 14 roundoffs off; so it is 2 or 3.
"""

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.triton._common import interpreting, narrow, on, require

__all__ = ["rope_cache"]  # what is registered


@triton.jit
def _angle(position, plane, HALF: tl.constexpr, log2_theta, log2_theta_low):
    """position * theta^(-plane / HALF), fp32."""
    part = plane.to(tl.float32) / HALF
    part_low = tl.fma(-part, HALF * 1.0, plane.to(tl.float32)) / HALF
    exponent = part * log2_theta
    low = tl.fma(part, log2_theta, -exponent) + part * log2_theta_low + part_low * log2_theta
    power = tl.exp2(-exponent)
    return position.to(tl.float32) * (power - power * (low * 0.6931471805599453))


@triton.jit
def _turned(at, heads, live, weight, w_stride, h_stride, d_stride, plane, cos, sin, eps,
            D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Both halves of the heads [n] at `at`, each [n, BH], normalised and rotated."""
    here = live[:, None] & (plane < HALF)[None, :]
    first_at = at + heads[:, None].to(tl.int64) * h_stride + plane[None, :].to(tl.int64) * d_stride
    first = tl.load(first_at, mask=here, other=0.0).to(tl.float32)
    second = tl.load(first_at + HALF * d_stride, mask=here, other=0.0).to(tl.float32)
    if NORM:
        weight_at = weight + plane.to(tl.int64) * w_stride
        squares = tl.sum(first * first + second * second, 1)
        inverse = (1.0 / tl.sqrt_rn(squares / D + eps))[:, None]
        first *= inverse * tl.load(weight_at, mask=plane < HALF, other=0.0).to(tl.float32)[None, :]
        second *= inverse * tl.load(weight_at + HALF * w_stride, mask=plane < HALF, other=0.0).to(tl.float32)[None, :]
    return first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :]


@triton.jit
def _rope_cache(
    q, k, v, positions, slots, key_cache, value_cache, q_norm, k_norm, out, eps, log2_theta, log2_theta_low,
    q_t, q_h, q_d, k_t, k_h, k_d, v_t, v_h, v_d, position_t, slot_t,
    kc_p, kc_s, kc_h, kc_d, vc_p, vc_s, vc_h, vc_d, qn_d, kn_d,
    QUERY_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BH: tl.constexpr,
    PAGE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Token program_id(0), key/value head program_id(1)."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token * slot_t).to(tl.int64)
    plane = tl.arange(0, BH)
    angle = _angle(tl.load(positions + token * position_t), plane, HALF, log2_theta, log2_theta_low)
    cos, sin = tl.cos(angle), tl.sin(angle)

    row = tl.arange(0, BG)
    heads = head * GROUP + row
    first, second = _turned(q + token * q_t, heads, row < GROUP, q_norm, qn_d, q_h, q_d, plane, cos, sin, eps,
                            D, HALF, Q_NORM)  # fmt: skip
    here = (row < GROUP)[:, None] & (plane < HALF)[None, :]
    out_at = out + (token * QUERY_HEADS + heads[:, None]) * D + plane[None, :]
    tl.store(out_at, narrow(first, out.dtype.element_ty, WIDEN), mask=here)
    tl.store(out_at + HALF, narrow(second, out.dtype.element_ty, WIDEN), mask=here)

    if slot >= 0:
        page, offset = slot // PAGE, slot % PAGE
        one = tl.arange(0, 1)
        k_first, k_second = _turned(k + token * k_t, head + one, one < 1, k_norm, kn_d, k_h, k_d, plane, cos, sin, eps,
                                D, HALF, K_NORM)  # fmt: skip
        k_here = (one < 1)[:, None] & (plane < HALF)[None, :]
        key_at = key_cache + page * kc_p + offset * kc_s + head.to(tl.int64) * kc_h + plane[None, :].to(tl.int64) * kc_d
        tl.store(key_at, narrow(k_first, key_cache.dtype.element_ty, WIDEN), mask=k_here)
        tl.store(key_at + HALF * kc_d, narrow(k_second, key_cache.dtype.element_ty, WIDEN), mask=k_here)
        value_at = v + token * v_t + head.to(tl.int64) * v_h + plane.to(tl.int64) * v_d
        to = value_cache + page * vc_p + offset * vc_s + head.to(tl.int64) * vc_h + plane.to(tl.int64) * vc_d
        tl.store(to, tl.load(value_at, mask=plane < HALF), mask=plane < HALF)
        tl.store(to + HALF * vc_d, tl.load(value_at + HALF * v_d, mask=plane < HALF), mask=plane < HALF)


def _check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse shapes that do not fit together."""
    tokens, query_heads, width = q.shape
    heads = k.shape[1]
    if width % 2 or heads == 0 or query_heads % heads:
        raise ValueError(f"q is {tuple(q.shape)} beside {heads} key heads: D should be even, Hq a multiple of Hk")
    wanted = {
        "k": (k, (tokens, heads, width)), "v": (v, (tokens, heads, width)), "positions": (positions, (tokens,)),
        "slots": (slots, (tokens,)), "key_cache": (keys, (*keys.shape[:2], heads, width)),
        "value_cache": (values, tuple(keys.shape)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape} beside q of {tuple(q.shape)}")


def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, theta: float,
) -> Tensor:  # fmt: skip
    """The stage `rope_cache`.

    Args:
        q: [T, Hq, D], k, v: [T, Hk, D], fp32, fp16 or bf16, any strides: views of one projection will do.
        positions, slots: int [T]; a slot of -1 writes nothing.
        key_cache, value_cache: [P, page, Hk, D], same dtype, any strides; the only arguments changed.
        q_norm, k_norm: [D], weights of the normalisation of every head.

    Returns:
        New contiguous [T, Hq, D].

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    norms = [w for w in (q_norm, k_norm) if w is not None]
    require(q, k, v, key_cache, value_cache, *norms)
    _check(q, k, v, positions, slots, key_cache, value_cache)
    tokens, query_heads, width = q.shape
    if any(tuple(w.shape) != (width,) for w in norms):
        raise ValueError(f"norm weights are {[tuple(w.shape) for w in norms]}, but should be {(width,)}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    group = query_heads // k.shape[1]
    high, low = _in_two_parts(math.log2(theta))
    with on(q.device):
        _rope_cache[(tokens, k.shape[1])](
            q, k, v, positions, slots, key_cache, value_cache, q if q_norm is None else q_norm,
            q if k_norm is None else k_norm, out, eps, high, low, *q.stride(), *k.stride(), *v.stride(),
            positions.stride(0), slots.stride(0), *key_cache.stride(), *value_cache.stride(),
            0 if q_norm is None else q_norm.stride(0), 0 if k_norm is None else k_norm.stride(0),
            QUERY_HEADS=query_heads, GROUP=group, BG=triton.next_power_of_2(group), D=width,
            BH=triton.next_power_of_2(width // 2), PAGE=key_cache.shape[1], Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None, WIDEN=interpreting(), num_warps=1,
        )  # fmt: skip
    return out


rope_cache.rounds = ()
rope_cache.deterministic = True
rope_cache.batch_invariant = True
rope_cache.graph_capturable = True


def _in_two_parts(x: float) -> tuple[float, float]:
    """(the nearest fp32 number, what is left), together x."""
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high
