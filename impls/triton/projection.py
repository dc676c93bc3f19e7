r"""A dense product for the few rows of a decoding step, in parts over K that whatever comes next adds up.

    out[p] = x[:, columns of part p] @ weight[:, columns of part p].T        fp32

A library's product of so few rows leaves multiprocessors idle or sums its parts in a launch of its own.  Here the sum
costs nothing: the norm or the routing behind it reads a few numbers more.  Weights do not depend on the kernel before,
so a program may have its first tile of them on its way before it waits for that one to end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    interpreting,
    let_next_start,
    on,
    product,
    require,
)

__all__ = ["projection"]


PROGRAMS = 128  # that a product is cut into: about one for each multiprocessor


class Plan(NamedTuple):
    """How a product is tiled: BM rows, BN columns, `steps` times BK of K in each program."""

    rows: int
    columns: int
    depth: int
    steps: int
    warps: int
    stages: int
    ahead: bool  # whether the first tile of weights is read before the wait
    swap: bool = False  # whether the weights' rows are those of the tensor cores' product


MEASURED = (
    Plan(16, 64, 128, 8, 4, 5, False, swap=True),
    Plan(64, 32, 128, 16, 4, 6, False),
    Plan(128, 64, 64, 16, 4, 5, False),
)


@triton.jit
def _rows_of(x, row, k, T, K, x_row, x_col, EVEN: tl.constexpr):
    mask = (row < T)[:, None] if EVEN else (row < T)[:, None] & (k < K)[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * x_row + k[None, :].to(tl.int64) * x_col, mask=mask, other=0.0)


@triton.jit
def _project(
    x, w, out, T, N, K, x_row, x_col, w_row, w_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr, SWAP: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[part program_id(2), BM rows, BN columns]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    start = tl.program_id(2) * (STEPS * BK)
    lane = tl.arange(0, BK)
    if AHEAD:
        known = _rows_of(w, n, start + lane, N, K, w_row, w_col, EVEN)
    after_previous(PDL)
    let_next_start(PDL)
    acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
    if AHEAD:
        rows = _rows_of(x, row, start + lane, T, K, x_row, x_col, EVEN)
        acc = product(known, rows.T, acc, WIDEN) if SWAP else product(rows, known.T, acc, WIDEN)
    for step in tl.range(1 if AHEAD else 0, STEPS):
        k = start + step * BK + lane
        rows = _rows_of(x, row, k, T, K, x_row, x_col, EVEN)
        weights = _rows_of(w, n, k, N, K, w_row, w_col, EVEN)
        acc = product(weights, rows.T, acc, WIDEN) if SWAP else product(rows, weights.T, acc, WIDEN)
    if SWAP:
        acc = tl.trans(acc)
    at = out + (tl.program_id(2).to(tl.int64) * T + row[:, None]) * N + n[None, :]
    tl.store(at, acc, mask=(row < T)[:, None] & (n < N)[None, :])


def projection(x: Tensor, weight: Tensor) -> Tensor | None:
    """The product of x [T, K] with weight [N, K] in parts over K.

    Args:
        weight: written before the kernel that precedes this one in the stream had started, as parameters are: it is
            read before that one has ended.

    Returns:
        fp32 [n, T, N], whose sum over n is x @ weight.T; None where a library's product is as fast.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(x, weight)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x and weight are {tuple(x.shape)} and {tuple(weight.shape)}, but should be [T, K], [N, K]")
    plan = plan_of(len(x), weight.shape[0], weight.shape[1], x.element_size())
    return None if plan is None else run((x, weight), plan)


def plan_of(rows: int, columns: int, depth: int, size: int) -> Plan | None:
    """How a product is tiled, its elements of `size` bytes; None where a library's is as fast.

    Measured on an H200 for 2,048 columns and a depth of 4,096 in bf16 (NOTES.md).  It pays where a library's tiles
    leave multiprocessors idle: with enough columns for a program each (5,120), or more rows, none of ours did.
    """
    if interpreting():
        return Plan(16, 16, 32, 2, 4, 1, True)
    if size != 2 or rows > MEASURED[-1].rows:
        return None
    plan = next(plan for plan in MEASURED if rows <= plan.rows)
    parts = PROGRAMS // triton.cdiv(columns, plan.columns)
    return None if parts < 2 else plan._replace(steps=triton.cdiv(triton.cdiv(depth, plan.depth), parts))


@Repeated
def run(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """`projection` as `plan` says."""
    (rows, depth), columns = x.shape, weight.shape[0]
    parts = max(1, triton.cdiv(depth, plan.depth * plan.steps))
    out = empty(x, parts, rows, columns, dtype=torch.float32)
    early = early_start(x.device)
    if out.numel():
        with on(x.device):
            launch(
                _project, (triton.cdiv(columns, plan.columns), triton.cdiv(rows, plan.rows), parts),
                x, weight, out, rows, columns, depth, *x.stride(), *weight.stride(), BM=plan.rows, BN=plan.columns,
                BK=plan.depth, STEPS=plan.steps, EVEN=0 < depth == parts * plan.depth * plan.steps, AHEAD=plan.ahead,
                SWAP=plan.swap, WIDEN=interpreting(), PDL=early, launch_pdl=early, num_warps=plan.warps,
                num_stages=plan.stages,
            )  # fmt: skip
    return out
