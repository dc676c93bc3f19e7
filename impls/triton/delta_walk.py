r"""The gated delta rule over sequences that lie one behind the other, in one launch.

    S_t = decay_t S_{t-1} + k_t (beta_t (v_t - (decay_t S_{t-1})^T k_t))^T        out_t = S_t^T q_t

Columns of S do not depend on each other: a program has BV of them, of one head of one sequence, in registers from the
first token to the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import interpreting, on, require

__all__ = ["delta_walk"]

COLUMNS = 16  # of a program: some 200 of them for one sequence of a released model


@triton.jit
def advanced(state, q, k, v, decay, beta):
    """S_t [BK, BV] and what is read of it [BV], from S_{t-1}, q and k [BK], v [BV] and two numbers; fp32."""
    state *= decay
    written = beta * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * written[None, :]
    return state, tl.sum(state * q[:, None], 0)


@triton.jit
def _walk(
    q, k, v, decay, beta, matrices, rows, query_start, positions, out, rows_s, start_s, position_t,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV columns, by program_id(2), of value head program_id(1) of sequence program_id(0)."""
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(query_start + s * start_s).to(tl.int64)
    stop = tl.load(query_start + (s + 1) * start_s).to(tl.int64)
    if first < stop:
        depth, column = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
        deep, wide = depth < DK, column < DV
        row = tl.load(rows + s * rows_s).to(tl.int64)
        kept = matrices + ((row * HEADS + head) * DK + depth[:, None]) * DV + column[None, :]
        known = tl.where(tl.load(positions + first * position_t) > 0, DK, 0)
        state = tl.load(kept, mask=(depth < known)[:, None] & wide[None, :], other=0.0)
        for token in range(first, stop):
            at, of_key = token * HEADS + head, (token * (HEADS // GROUP) + head // GROUP) * DK + depth
            state, read = advanced(
                state, tl.load(q + of_key, mask=deep, other=0.0), tl.load(k + of_key, mask=deep, other=0.0),
                tl.load(v + at * DV + column, mask=wide, other=0.0), tl.load(decay + at), tl.load(beta + at),
            )  # fmt: skip
            tl.store(out + at * DV + column, read, mask=wide)
        tl.store(kept, state, mask=deep[:, None] & wide[None, :])


def delta_walk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrices: Tensor, rows: Tensor, query_start: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """What is read at every token, [T, Hv, Dv]; fp32.

    Args:
        q, k: [T, Hk, Dk], v: [T, Hv, Dv], decay, beta: [T, Hv], fp32, any strides.
        matrices: fp32 [R, Hv, Dk, Dv], contiguous, by row; left behind each sequence's last token.
        rows: int [S], of each sequence, which begins with nothing at position 0.
        query_start: int [S + 1]; positions: int [T].

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(q, k, v, decay, beta, matrices)
    (tokens, heads, width), (key_heads, depth) = v.shape, k.shape[1:]
    wanted = {
        "q": (q, (tokens, key_heads, depth)), "k": (k, (tokens, key_heads, depth)), "decay": (decay, (tokens, heads)),
        "beta": (beta, (tokens, heads)), "matrices": (matrices, (len(matrices), heads, depth, width)),
        "query_start": (query_start, (len(rows) + 1,)), "positions": (positions, (tokens,)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but should be {shape} beside v of {tuple(v.shape)}")
    if v.dtype != torch.float32 or not matrices.is_contiguous():
        raise ValueError(f"v is {v.dtype}, or matrices are not contiguous, but should be fp32 and contiguous")
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} value heads do not share {key_heads} key heads evenly")
    given = (part.contiguous() for part in (q, k, v, decay, beta))
    return _walked((*given, matrices, rows, query_start, positions))


@Repeated
def _walked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrices: Tensor, rows: Tensor, query_start: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    (_, heads, width), depth = v.shape, k.shape[2]
    out = empty(v, *v.shape)
    if out.numel() and len(rows):
        columns = min(COLUMNS, triton.next_power_of_2(width)) if not interpreting() else triton.next_power_of_2(width)
        with on(v.device):
            launch(
                _walk, (len(rows), heads, triton.cdiv(width, columns)),
                q, k, v, decay, beta, matrices, rows, query_start, positions, out, rows.stride(0),
                query_start.stride(0), positions.stride(0), HEADS=heads, GROUP=heads // k.shape[1], DK=depth, DV=width,
                BK=triton.next_power_of_2(depth), BV=columns, num_warps=1,
            )  # fmt: skip
    return out


delta_walk.graph_capturable = True
