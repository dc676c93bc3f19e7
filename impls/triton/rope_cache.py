r"""From the projection to attention in one launch: heads normalised, rotated, keys and values written to their slots.

One program has one token and either one key/value head or the query heads that share it.  Everything between load
and store is fp32.  The angle of plane i is position * theta^(-i / (D/2)): the power is taken with an exponent in two
parts, since one fp32 exponent of about 20 bits would leave the frequency 14 roundoffs off; so it is 2 or 3.

Where the first `turned` elements of a head are rotated and the others kept, those others make planes too, which are
turned by an angle of 0.
"""

import math
import struct

import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    interpreting,
    let_next_start,
    narrow,
    on,
    require,
    require_scale,
)

__all__ = ["rope_cache"]  # what is registered


@triton.jit
def _pairs(plane, HALF: tl.constexpr, TURNED: tl.constexpr):
    """The two elements of a head that make up each plane: i and i + TURNED, then those behind in two halves."""
    one, other = plane, plane + HALF
    if TURNED < HALF:
        one = tl.where(plane < TURNED, plane, plane + TURNED)
        other = tl.where(plane < TURNED, plane + TURNED, plane + HALF)
    return one, other


@triton.jit
def _cos_sin(position, plane, HALF: tl.constexpr, TURNED: tl.constexpr, log2_theta, log2_theta_low):
    angle = _angle(position, plane, TURNED, log2_theta, log2_theta_low)
    if TURNED < HALF:
        angle = tl.where(plane < TURNED, angle, 0.0)
    return tl.cos(angle), tl.sin(angle)


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
def _halves(at, heads, live, h_stride, d_stride, one, other, plane, HALF: tl.constexpr):
    """Elements `one` and `other` of the heads [n] at `at`, each fp32 [n, BH]."""
    here = live[:, None] & (plane < HALF)[None, :]
    head = at + heads[:, None].to(tl.int64) * h_stride
    first = tl.load(head + one[None, :].to(tl.int64) * d_stride, mask=here, other=0.0)
    second = tl.load(head + other[None, :].to(tl.int64) * d_stride, mask=here, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _scales(weight, stride, one, other, plane, HALF: tl.constexpr, NORM: tl.constexpr):
    """Elements `one` and `other` of the weight of a normalisation, each fp32 [BH]."""
    first, second = 1.0, 1.0
    if NORM:
        first = tl.load(weight + one.to(tl.int64) * stride, mask=plane < HALF, other=0.0).to(tl.float32)
        second = tl.load(weight + other.to(tl.int64) * stride, mask=plane < HALF, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turned(first, second, scale, scale_second, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Both halves normalised and rotated.

    Which product is rounded alone is said here: left to the compiler, it differed between callers, and so did bits.
    """
    if NORM:
        squares = tl.fma(first, first, second * second)
        inverse = (1.0 / tl.sqrt_rn(tl.sum(squares, 1) / D + eps))[:, None]
        first *= inverse * scale[None, :]
        second *= inverse * scale_second[None, :]
    cos, sin = cos[None, :], sin[None, :]
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def _rope_cache(
    q, k, v, positions, slots, key_cache, value_cache, q_norm, k_norm, out, eps, log2_theta, log2_theta_low,
    q_t, q_h, q_d, k_t, k_h, k_d, v_t, v_h, v_d, position_t, slot_t,
    kc_p, kc_s, kc_h, kc_d, vc_p, vc_s, vc_h, vc_d, qn_d, kn_d,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr, BH: tl.constexpr,
    PAGE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, AHEAD: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Token program_id(0).  Programs below HEADS have the query heads of one key/value head, those from it on its key.

    The angle takes the longest.  AHEAD: it is taken before the program waits, otherwise while all reads are under way.
    """
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    plane = tl.arange(0, BH)
    one, other = _pairs(plane, HALF, TURNED)
    if AHEAD:
        known = tl.load(positions + token * position_t)
        cos, sin = _cos_sin(known, plane, HALF, TURNED, log2_theta, log2_theta_low)
    after_previous(PDL)
    let_next_start(PDL)
    position = tl.load(positions + token * position_t)
    if head < HEADS:
        row = tl.arange(0, BG)
        heads = head * GROUP + row
        first, second = _halves(q + token * q_t, heads, row < GROUP, q_h, q_d, one, other, plane, HALF)
        scale, scale_second = _scales(q_norm, qn_d, one, other, plane, HALF, Q_NORM)
        if not AHEAD:
            cos, sin = _cos_sin(position, plane, HALF, TURNED, log2_theta, log2_theta_low)
        first, second = _turned(first, second, scale, scale_second, cos, sin, eps, D, Q_NORM)
        here = (row < GROUP)[:, None] & (plane < HALF)[None, :]
        at = out + (token * HEADS * GROUP + heads[:, None]) * D
        tl.store(at + one[None, :], narrow(first, out.dtype.element_ty, WIDEN), mask=here)
        tl.store(at + other[None, :], narrow(second, out.dtype.element_ty, WIDEN), mask=here)
    else:
        slot = tl.load(slots + token * slot_t).to(tl.int32)
        if slot >= 0:
            own = head - HEADS + tl.arange(0, 1)
            k_first, k_second = _halves(k + token * k_t, own, own >= 0, k_h, k_d, one, other, plane, HALF)
            value, value_second = _halves(v + token * v_t, own, own >= 0, v_h, v_d, one, other, plane, HALF)
            k_scale, k_scale_second = _scales(k_norm, kn_d, one, other, plane, HALF, K_NORM)
            if not AHEAD:
                cos, sin = _cos_sin(position, plane, HALF, TURNED, log2_theta, log2_theta_low)
            k_first, k_second = _turned(k_first, k_second, k_scale, k_scale_second, cos, sin, eps, D, K_NORM)
            page, offset = (slot // PAGE).to(tl.int64), (slot % PAGE).to(tl.int64)
            k_here = (own >= 0)[:, None] & (plane < HALF)[None, :]
            cache_head = own[:, None].to(tl.int64)
            column, column_second = one[None, :].to(tl.int64), other[None, :].to(tl.int64)
            key_at = key_cache + page * kc_p + offset * kc_s + cache_head * kc_h
            tl.store(key_at + column * kc_d, narrow(k_first, key_cache.dtype.element_ty, WIDEN), mask=k_here)
            tl.store(key_at + column_second * kc_d, narrow(k_second, key_cache.dtype.element_ty, WIDEN), mask=k_here)
            value_at = value_cache + page * vc_p + offset * vc_s + cache_head * vc_h
            value = narrow(value, value_cache.dtype.element_ty, WIDEN)
            tl.store(value_at + column * vc_d, value, mask=k_here)
            value_second = narrow(value_second, value_cache.dtype.element_ty, WIDEN)
            tl.store(value_at + column_second * vc_d, value_second, mask=k_here)


def _check(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, turned: int,
) -> None:  # fmt: skip
    """Refuse shapes and dtypes that do not fit together."""
    tokens, query_heads, width = q.shape
    heads = k.shape[1]
    if width % 2 or heads == 0 or query_heads % heads:
        raise ValueError(f"q is {tuple(q.shape)} beside {heads} key heads: D should be even, Hq a multiple of Hk")
    if turned % 2 or not 0 < turned <= width:
        raise ValueError(f"turned is {turned}, but should be an even number up to {width}")
    wanted = {
        "k": (k, (tokens, heads, width)), "v": (v, (tokens, heads, width)), "positions": (positions, (tokens,)),
        "slots": (slots, (tokens,)), "key_cache": (keys, (*keys.shape[:2], heads, width)),
        "value_cache": (values, tuple(keys.shape)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape} beside q of {tuple(q.shape)}")
    norms = [w for w in (q_norm, k_norm) if w is not None]
    require_scale(keys, *norms)
    if any(tuple(w.shape) != (width,) for w in norms):
        raise ValueError(f"norm weights are {[tuple(w.shape) for w in norms]}, but should be {(width,)}")


def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, theta: float,
    turned: int | None = None,
) -> Tensor:  # fmt: skip
    """The stage `rope_cache`.

    Args:
        q: [T, Hq, D], k, v: [T, Hk, D], fp32, fp16 or bf16, any strides: views of one projection will do.
        positions, slots: int [T]; a slot of -1 writes nothing.
        key_cache, value_cache: [P, page, Hk, D], same dtype, any strides; the only arguments changed.
        q_norm, k_norm: [D], weights of the normalisation of every head; same dtype or fp32.
        turned: how many of a head's elements are rotated, the first ones; None: all.

    Returns:
        New contiguous [T, Hq, D].

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    return _turn((q, k, v, positions, slots, key_cache, value_cache, q_norm, k_norm), eps, theta, turned, False)


def rope_cache_of_step(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor, *,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6, theta: float,
    turned: int | None = None,
) -> Tensor:  # fmt: skip
    """`rope_cache` where positions were written before the kernel that precedes this one in the stream had started.

    They are read, and the angles taken, before that one has ended.
    """
    return _turn((q, k, v, positions, slots, key_cache, value_cache, q_norm, k_norm), eps, theta, turned, True)


@Repeated
def _turn(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, theta: float, turned: int | None, ahead: bool,
) -> Tensor:  # fmt: skip
    """`rope_cache` with every argument by position."""
    require(q, k, v, key_cache, value_cache)
    tokens, query_heads, width = q.shape
    turned = width if turned is None else turned
    _check(q, k, v, positions, slots, key_cache, value_cache, q_norm, k_norm, turned)
    out = empty(key_cache, *q.shape)
    if tokens == 0:
        return out
    group = query_heads // k.shape[1]
    high, low = _in_two_parts(math.log2(theta))
    early = early_start(q.device)
    with on(q.device):
        launch(
            _rope_cache, (tokens, 2 * k.shape[1]),
            q, k, v, positions, slots, key_cache, value_cache, q if q_norm is None else q_norm,
            q if k_norm is None else k_norm, out, eps, high, low, *q.stride(), *k.stride(), *v.stride(),
            positions.stride(0), slots.stride(0), *key_cache.stride(), *value_cache.stride(),
            0 if q_norm is None else q_norm.stride(0), 0 if k_norm is None else k_norm.stride(0),
            HEADS=k.shape[1], GROUP=group, BG=triton.next_power_of_2(group), D=width,
            TURNED=turned // 2, BH=triton.next_power_of_2(width // 2), PAGE=key_cache.shape[1],
            Q_NORM=q_norm is not None, K_NORM=k_norm is not None, AHEAD=ahead, WIDEN=interpreting(), PDL=early,
            launch_pdl=early, num_warps=1,
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
