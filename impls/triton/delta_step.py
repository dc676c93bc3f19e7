r"""One token of a gated delta net for every sequence, from its projections to what goes into the last one, in a launch.

    q, k, v   silu of a causal convolution over the last K inputs; q and k then of length one, q / sqrt(Dk)
    decay     exp(-exp(a_log) softplus(a + dt_bias)),   beta = sigmoid(b)
    S, read   as `delta_walk` has them
    out       norm(read) * silu(z)

A program has one value head of one sequence.  Inputs of the convolution lie in a ring, that of position p in place
p mod K.  A step reads the K - 1 places before it and writes its own, which no other program of the step reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    exact_exp,
    exact_sigmoid,
    interpreting,
    let_next_start,
    narrow,
    on,
    require,
)
from moe_harness.impls.triton.delta_walk import advanced

__all__ = ["delta_step"]

LENGTH_EPS: tl.constexpr = tl.constexpr(1e-6)  # below the square of a query's or key's length


@triton.jit
def _convolved(
    new, ring, weight, lane, size, first, position, kept, CHANNELS: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """silu of the convolution of `size` channels from `first` on, fp32; `kept` of their inputs go into the ring."""
    channel = first + lane
    x = tl.load(new + lane, mask=lane < size, other=0.0)
    tl.store(ring + (position % K) * CHANNELS + channel, x, mask=lane < kept)
    total = x.to(tl.float32) * tl.load(weight + channel * K + K - 1, mask=lane < size, other=0.0).to(tl.float32)
    for back in tl.static_range(1, K):
        live = lane < tl.where(position >= back, size, 0)
        before = tl.load(ring + ((position + K - back) % K) * CHANNELS + channel, mask=live, other=0.0)
        tap = tl.load(weight + channel * K + K - 1 - back, mask=live, other=0.0)
        total += before.to(tl.float32) * tap.to(tl.float32)
    return total * exact_sigmoid(total)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) in fp32; the rounding of 1 + exp is made up for where exp is small."""
    small = exact_exp(-tl.abs(x))
    more = 1.0 + small
    rest = tl.where(more > 1.0, tl.log(more) * (small / tl.where(more > 1.0, more - 1.0, 1.0)), small)
    return tl.maximum(x, 0.0) + rest


@triton.jit
def _step(
    qkvz, ba, weight, a_log, dt_bias, norm, inputs, matrices, rows, positions, out, eps, scale, rows_s, position_s,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    K: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Value head program_id(1) of sequence program_id(0)."""
    KEYS: tl.constexpr = HEADS // GROUP * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    WIDTH: tl.constexpr = 2 * DK + 2 * GROUP * DV  # of a key head in qkvz
    after_previous(PDL)
    let_next_start(PDL)
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key_head, member = head // GROUP, head % GROUP
    depth, column = tl.arange(0, BK), tl.arange(0, BV)
    deep, wide = depth < DK, column < DV
    row = tl.load(rows + s * rows_s).to(tl.int64)
    position = tl.load(positions + s * position_s).to(tl.int32)
    kept = matrices + ((row * HEADS + head) * DK + depth[:, None]) * DV + column[None, :]
    known = tl.where(position > 0, DK, 0)
    state = tl.load(kept, mask=(depth < known)[:, None] & wide[None, :], other=0.0)

    own, ring = qkvz + (s * (HEADS // GROUP) + key_head) * WIDTH, inputs + row * K * CHANNELS
    of_value, mine = 2 * DK + member * DV, tl.where(member == 0, DK, 0)
    q = _convolved(own, ring, weight, depth, DK, key_head * DK, position, mine, CHANNELS, K)
    k = _convolved(own + DK, ring, weight, depth, DK, KEYS + key_head * DK, position, mine, CHANNELS, K)
    v = _convolved(own + of_value, ring, weight, column, DV, 2 * KEYS + head * DV, position, DV, CHANNELS, K)
    q *= scale / tl.sqrt_rn(tl.sum(q * q, 0) + LENGTH_EPS)
    k *= 1.0 / tl.sqrt_rn(tl.sum(k * k, 0) + LENGTH_EPS)

    gates = ba + (s * (HEADS // GROUP) + key_head) * 2 * GROUP + member
    shifted = tl.load(gates + GROUP).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    decay = exact_exp(-exact_exp(tl.load(a_log + head).to(tl.float32)) * _softplus(shifted))
    state, read = advanced(state, q, k, v, decay, exact_sigmoid(tl.load(gates).to(tl.float32)))
    tl.store(kept, state, mask=deep[:, None] & wide[None, :])

    z = tl.load(own + GROUP * DV + of_value + column, mask=wide, other=0.0).to(tl.float32)
    by = tl.load(norm + column, mask=wide, other=0.0).to(tl.float32) * z * exact_sigmoid(z)
    result = read * (1.0 / tl.sqrt_rn(tl.sum(read * read, 0) / DV + eps)) * by
    tl.store(out + (s * HEADS + head) * DV + column, narrow(result, out.dtype.element_ty, WIDEN), mask=wide)


def delta_step(
    qkvz: Tensor, ba: Tensor, weight: Tensor, a_log: Tensor, dt_bias: Tensor, norm: Tensor, inputs: Tensor,
    matrices: Tensor, rows: Tensor, positions: Tensor, *, eps: float,
) -> Tensor:  # fmt: skip
    """What goes into the last projection, [S, Hv * Dv].

    Args:
        qkvz: [S, Hk * (2 Dk + 2 Hv / Hk Dv)], key head by key head, fp32, fp16 or bf16.
        ba: [S, 2 Hv], likewise.
        weight: [C, K], of the convolution of all heads' queries, keys and values, one after the other.
        a_log, dt_bias: [Hv].
        norm: [Dv].
        inputs: [R, K, C], same dtype, and matrices, fp32 [R, Hv, Dk, Dv]: by row, both changed.
        rows: int [S], of each sequence; positions: int [S], at 0 a sequence begins with nothing.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(qkvz, ba, weight, a_log, dt_bias, norm, inputs)
    heads, depth, width = matrices.shape[1:]
    channels, kernel = weight.shape
    key_heads = (channels - heads * width) // (2 * depth)
    wanted = {
        "qkvz": (qkvz, (len(rows), channels + heads * width)), "ba": (ba, (len(rows), 2 * heads)),
        "weight": (weight, (2 * key_heads * depth + heads * width, kernel)), "a_log": (a_log, (heads,)),
        "dt_bias": (dt_bias, (heads,)), "norm": (norm, (width,)), "positions": (positions, (len(rows),)),
        "inputs": (inputs, (len(matrices), kernel, channels)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but should be {shape} beside matrices of {tuple(matrices.shape)}"
            )
        if name != "positions" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, but should be contiguous")
    if not matrices.is_contiguous() or matrices.dtype != torch.float32:
        raise ValueError(f"matrices are {matrices.dtype}, or not contiguous, but should be fp32 and contiguous")
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} value heads do not share {key_heads} key heads evenly")
    return _stepped((qkvz, ba, weight, a_log, dt_bias, norm, inputs, matrices, rows, positions), key_heads, eps)


@Repeated
def _stepped(
    qkvz: Tensor, ba: Tensor, weight: Tensor, a_log: Tensor, dt_bias: Tensor, norm: Tensor, inputs: Tensor,
    matrices: Tensor, rows: Tensor, positions: Tensor, key_heads: int, eps: float,
) -> Tensor:  # fmt: skip
    heads, depth, width = matrices.shape[1:]
    out = empty(qkvz, len(rows), heads * width)
    early = early_start(qkvz.device)
    if out.numel():
        block_k, block_v = triton.next_power_of_2(depth), triton.next_power_of_2(width)
        with on(qkvz.device):
            launch(
                _step, (len(rows), heads), qkvz, ba, weight, a_log, dt_bias, norm, inputs, matrices, rows, positions,
                out, eps, depth**-0.5, rows.stride(0), positions.stride(0), HEADS=heads, GROUP=heads // key_heads,
                DK=depth, DV=width, BK=block_k, BV=block_v, K=weight.shape[1], WIDEN=interpreting(), PDL=early,
                launch_pdl=early, num_warps=max(1, min(8, block_k * block_v // 2048)),
            )  # fmt: skip
    return out


delta_step.graph_capturable = True
