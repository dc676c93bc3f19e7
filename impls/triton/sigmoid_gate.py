"""The output of attention gated element by element, in one launch: x * sigmoid(gate), in fp32 and rounded once."""

import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import (
    after_previous,
    early_start,
    exact_sigmoid,
    interpreting,
    let_next_start,
    narrow,
    on,
    require,
)

__all__ = ["sigmoid_gate"]


@triton.jit
def _gate(
    x, gate, out, width, x_t, x_h, x_d, g_t, g_h, g_d,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK of the `width` elements of token program_id(0), all heads in a row."""
    after_previous(PDL)
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, column, live = (element // D).to(tl.int64), (element % D).to(tl.int64), element < width
    value = tl.load(x + token * x_t + head * x_h + column * x_d, mask=live, other=0.0).to(tl.float32)
    by = tl.load(gate + token * g_t + head * g_h + column * g_d, mask=live, other=0.0).to(tl.float32)
    result = narrow(value * exact_sigmoid(by), out.dtype.element_ty, WIDEN)
    tl.store(out + token * width + element, result, mask=live)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate).

    Args:
        x, gate: [T, heads, D], fp32, fp16 or bf16, any strides: a view of a projection will do.

    Returns:
        New contiguous [T, heads, D].

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    require(x, gate)
    if x.ndim != 3 or gate.shape != x.shape:
        raise ValueError(f"x and gate are {tuple(x.shape)} and {tuple(gate.shape)}, but should both be [T, heads, D]")
    return _gated((x, gate))


@Repeated
def _gated(x: Tensor, gate: Tensor) -> Tensor:
    tokens, heads, depth = x.shape
    out = empty(x, tokens, heads, depth)
    width, early = heads * depth, early_start(x.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        with on(x.device):
            launch(
                _gate, (tokens, triton.cdiv(width, block)), x, gate, out, width, *x.stride(), *gate.stride(),
                D=depth, BLOCK=block, WIDEN=interpreting(), PDL=early, launch_pdl=early, num_warps=4,
            )  # fmt: skip
    return out


sigmoid_gate.graph_capturable = True
