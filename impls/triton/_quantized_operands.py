"""What the kernels of the quantised experts share: their operands, rows as codes, biases and the activation."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import empty, launch
from moe_harness.impls.triton._codes import RUN, _quantise
from moe_harness.impls.triton._common import (
    early_start,
    exact_sigmoid,
    gated,
    interpreting,
    on,
    quick_sigmoid,
)
from moe_harness.impls.triton._half_bytes import weave_rows

RUN_OF = {"fp8_block": 128, "int4_group": 128, "mxfp4": 32}  # columns under one scale of the weights
PACKED = ("int4_group", "mxfp4")  # two codes a byte
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Matrix(NamedTuple):
    """The weights of all experts: codes [E, N, K] of `format` with scales, and biases [E, N] or None."""

    codes: Tensor
    scale: Tensor | None
    bias: Tensor | None
    format: str


def columns_of(matrix: Matrix) -> int:
    """K of matrices [E, N, K]."""
    return matrix.codes.shape[2] * (2 if matrix.format in PACKED else 1)


class Rows(NamedTuple):
    """Activations [S, K]: numbers, or codes with a scale for each 128 columns.

    `woven`: numbers in the order in which codes of four bits meet them, 128 columns at a time, zeros behind the last.
    """

    values: Tensor
    scale: Tensor | None = None
    woven: bool = False


class Routing(NamedTuple):
    """Which slots belong to which expert: as `align` tells, or (`counts` None) each slot its own run."""

    ids: Tensor
    expert_map: Tensor | None
    counts: Tensor | None
    slots: Tensor | None


@triton.jit
def hidden_values(g, u, ACT: tl.constexpr, TO: tl.constexpr):
    """The activation of gate and up in fp32, good enough to be rounded to TO.  A NaN passes every clamp."""
    if ACT == "swiglu_oai":
        g = tl.where(g > 7.0, 7.0, g)
        u = tl.where(u > 7.0, 7.0, tl.where(u < -7.0, -7.0, u))
        z = 1.702 * g
        out = (u + 1.0) * (g * (exact_sigmoid(z) if tl.float32 == TO else quick_sigmoid(z)))
    else:
        out = gated(g, u, ACT == "gelu_tanh", TO)
    return out


@triton.jit
def biased(acc, bias, e, n, N, b_e, b_n, BIAS: tl.constexpr):
    """acc [BN, BM] and the biases of weight rows n of expert e."""
    if BIAS:
        at = bias + e.to(tl.int64) * b_e + n.to(tl.int64) * b_n
        acc += tl.load(at, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return acc


def weavable(format: str, dtype: torch.dtype) -> bool:
    """Whether rows for `format` may be woven: fp16 has steps of 32 columns for mxfp4, not of 128."""
    return format in PACKED and (format != "mxfp4" or dtype != torch.float16)


def quantise(x: Tensor) -> Rows:
    """x [S, K], operand of a call, as codes of e4m3 [S, K] and scales fp32 [S, ceil(K / 128)].

    Launched behind the alignment of the call, with which it may run at once.
    """
    rows, columns = x.shape
    groups = triton.cdiv(columns, RUN.value)
    codes = codes_for(x, rows, columns)
    scales = empty(x, rows, groups, dtype=torch.float32)
    across = min(32 if rows >= 1024 else 8, triton.next_power_of_2(groups))
    early = early_start(x.device)
    with on(x.device):
        launch(
            _quantise, (rows, triton.cdiv(groups, across)), x, codes, scales, columns, groups, *x.stride(),
            codes.stride(0), scales.stride(0), GROUPS=across, RUN=RUN.value, WIDEN=interpreting(), PDL=early,
            launch_pdl=early, num_warps=4,
        )  # fmt: skip
    return Rows(codes, scales)


def weave(x: Tensor) -> Rows:
    """x [S, K], operand of a call, woven; launched as `quantise` is."""
    rows, columns = x.shape
    groups = triton.cdiv(columns, 128)
    out = empty(x, rows, groups * 128)
    across = min(16 if rows >= 1024 else 4, triton.next_power_of_2(groups))
    early = early_start(x.device)
    with on(x.device):
        launch(
            weave_rows, (rows, triton.cdiv(groups, across)), x, out, columns, *x.stride(), out.stride(0),
            GROUPS=across, PDL=early, launch_pdl=early, num_warps=4,
        )  # fmt: skip
    return Rows(out, woven=True)


def codes_for(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for codes whose rows start 16-byte aligned."""
    return empty(like, rows, triton.cdiv(columns, 16) * 16, dtype=torch.float8_e4m3fn)[:, :columns]


def scale_strides(matrix: Matrix) -> tuple[int, ...]:
    """Of expert, row and run of columns; one scale a row stands under every run."""
    if matrix.scale is None:
        return (0, 0, 0)
    return (*matrix.scale.stride(), 0)[:3]
