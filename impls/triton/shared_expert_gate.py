r"""The gate of the shared expert as one row kernel.

    y = sigmoid(x . w) * shared_output       dot product, sigmoid and product in fp32, one rounding

The plain expression takes three kernels and writes the gate in between.  Leading dimensions are folded into rows; where
their strides cannot be folded, that operand is copied (a `reshape`).  Rows longer than LONGEST do not fit in the
registers of one program, and are left to the plain expression in fp32: `fits` is the rule.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_harness.impls.launching import Repeated, empty, launch
from moe_harness.impls.triton._common import exact_sigmoid, interpreting, narrow, on, require

__all__ = ["shared_expert_gate"]  # what is registered

LONGEST = 16384


@triton.jit
def _gate_rows(
    x, w, y, out, S, H, D, x_row, x_col, w_col, y_row, y_col,
    BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BM rows; both operands are on their way before the dot product is taken."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    h = tl.arange(0, BH)
    d = tl.arange(0, BD)
    live = (row < S)[:, None]
    at_x = x + row[:, None].to(tl.int64) * x_row + h[None, :].to(tl.int64) * x_col
    at_y = y + row[:, None].to(tl.int64) * y_row + d[None, :].to(tl.int64) * y_col
    rows = tl.load(at_x, mask=live & (h < H)[None, :], other=0.0)
    shared = tl.load(at_y, mask=live & (d < D)[None, :], other=0.0)
    weight = tl.load(w + h.to(tl.int64) * w_col, mask=h < H, other=0.0)
    gate = exact_sigmoid(tl.sum(rows.to(tl.float32) * weight.to(tl.float32)[None, :], 1))
    result = narrow(gate[:, None] * shared.to(tl.float32), out.dtype.element_ty, WIDEN)
    tl.store(out + row[:, None].to(tl.int64) * D + d[None, :], result, mask=live & (d < D)[None, :])


def fits(hidden: int, width: int) -> bool:
    """Whether rows of `hidden` and `width` columns are handled by the kernel rather than by the plain expression."""
    return 0 < hidden <= LONGEST and 0 < width <= LONGEST


def _check(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit together."""
    require(hidden_states, gate_weight, shared_output)
    if tuple(gate_weight.shape) != (1, hidden_states.shape[-1]):
        raise ValueError(f"gate_weight is {tuple(gate_weight.shape)}, but should be {(1, hidden_states.shape[-1])}")
    if hidden_states.shape[:-1] != shared_output.shape[:-1]:
        raise ValueError(
            f"leading dimensions are {tuple(hidden_states.shape[:-1])} and {tuple(shared_output.shape[:-1])}, "
            "but should be equal"
        )


def shared_expert_gate(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    """Scale each row of the shared expert's output by its gate.

    Args:
        hidden_states: [..., H], fp32, fp16 or bf16.
        gate_weight: [1, H], same dtype.
        shared_output: [..., D], same dtype and leading dimensions; D may differ from H.

    Returns:
        New contiguous [..., D] in the same dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: shapes, dtypes, devices that do not fit.
    """
    _check(hidden_states, gate_weight, shared_output)
    hidden, width = hidden_states.shape[-1], shared_output.shape[-1]
    if not fits(hidden, width):
        gate = (hidden_states.float() @ gate_weight.float().T).sigmoid()
        return (gate * shared_output.float()).to(hidden_states.dtype).contiguous()
    rows = (hidden_states.reshape(-1, hidden), gate_weight, shared_output.reshape(-1, width))
    return _gated_rows(rows).view(shared_output.shape)


@Repeated
def _gated_rows(x: Tensor, gate_weight: Tensor, y: Tensor) -> Tensor:
    """[S, D] for x [S, H] and y [S, D]."""
    (count, hidden), width = x.shape, y.shape[1]
    out = empty(x, count, width)
    if count == 0:
        return out
    block_h, block_d = triton.next_power_of_2(hidden), triton.next_power_of_2(width)
    rows = 4 if interpreting() else 1
    warps = max(1, min(16, max(block_h, block_d) // 512))  # 16 elements per thread: two 16-byte loads of bf16 in flight
    with on(x.device):
        launch(
            _gate_rows, (triton.cdiv(count, rows),),
            x, gate_weight, y, out, count, hidden, width, *x.stride(), gate_weight.stride(1), *y.stride(),
            BM=rows, BH=block_h, BD=block_d, WIDEN=interpreting(), num_warps=warps,
        )  # fmt: skip
    return out


shared_expert_gate.deterministic = True
shared_expert_gate.graph_capturable = True
shared_expert_gate.rounds = ()
shared_expert_gate.batch_invariant = True
