r"""The routed experts for weights as they are shipped, as fused Triton kernels.

    [g; u] = W_gate_up[e] @ x[t] + b_gate_up[e]                    a = act(g, u)
    out[t] = sum over j of w[t, j] * (W_down[e] @ a + b_down[e])

`quantized_experts` keeps activations in their dtype and makes numbers of the codes in registers: bound by the bytes of
the codes at few tokens.  `fp8_group128` makes codes of the activations too, 128 columns under one scale, and multiplies
codes with codes in the fp8 tensor cores; sums of 128 columns are scaled and added up in fp32.  Hidden states are
quantised by each program that reads them or in a launch of their own, beside the alignment; hidden values by the
programs that read them or, behind an alignment, by the kernel that computes them.

Few slots: two products and the weighted sum.  Otherwise an alignment before them (and that launch).  Results are
bitwise the same in every run, and nothing waits for the device.  Rounded to the input dtype on the way: `activation`
and `expert_output`; weights, scales and routing weights enter in fp32.
"""

import torch
import triton
from torch import Tensor

from moe_harness.impls.launching import Repeated
from moe_harness.impls.triton._combine import combine
from moe_harness.impls.triton._common import interpreting, require
from moe_harness.impls.triton._quantized_operands import PACKED, Matrix, Routing, Rows, quantise, weavable, weave
from moe_harness.impls.triton._quantized_product import quantized_product
from moe_harness.impls.triton.alignment import align
from moe_harness.impls.triton.configs import Shape
from moe_harness.impls.triton.quantized_plans import plan_of

__all__ = ["fp8_group128", "quantized_experts"]

CODES = {
    "fp8_block": torch.float8_e4m3fn, "fp8_channel": torch.float8_e4m3fn, "int8_channel": torch.int8,
    "int4_group": torch.uint8, "mxfp4": torch.uint8,
}  # fmt: skip
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")


def scale_shape(format: str, experts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the scales of matrices [E, N, K] in `format`."""
    if format in ("fp8_channel", "int8_channel"):
        return (experts, rows)
    if format == "fp8_block":
        return (experts, triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    return (experts, rows, columns // (128 if format == "int4_group" else 32))


def _check_matrix(name: str, codes: Tensor, scale: Tensor | None, format: str, wanted: tuple[int, int, int]) -> None:
    """Refuse codes and scales that are not those of matrices of the shape `wanted` [E, N, K]."""
    experts, rows, columns = wanted
    width = columns // 2 if format in PACKED else columns
    if columns % {"int4_group": 128, "mxfp4": 32}.get(format, 1):
        raise ValueError(f"{name} has {columns} columns, which {format} does not divide into runs")
    if tuple(codes.shape) != (experts, rows, width):
        raise ValueError(f"{name} is {tuple(codes.shape)}, but should be {(experts, rows, width)} in {format}")
    if format == "plain":
        return
    if codes.dtype != CODES[format]:
        raise TypeError(f"{name} holds {codes.dtype}, but {format} has codes of {CODES[format]}")
    shape = scale_shape(format, experts, rows, columns)
    if scale is None or tuple(scale.shape) != shape:
        found = "missing" if scale is None else tuple(scale.shape)
        raise ValueError(f"the scale of {name} is {found}, but should be {shape} in {format}")


def _check(
    x: Tensor, up: Tensor, up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None, weights: Tensor,
    ids: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, format: str, activation: str, quantize: bool,
) -> None:  # fmt: skip
    """Refuse what does not fit together, and devices without the arithmetic."""
    require(x, *([up, down] if format == "plain" else []))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, but should be one of {', '.join(ACTIVATIONS)}")
    formats = fp8_group128.formats if quantize else ("plain", *CODES)
    if format not in formats:
        raise NotImplementedError(f"format is {format!r}, but should be one of {', '.join(formats)}")
    hidden = x.shape[1]
    if up.dim() != 3 or down.dim() != 3 or up.shape[1] % 2:
        raise ValueError(f"weights are {tuple(up.shape)} and {tuple(down.shape)}, but should be [E, 2I, .], [E, H, .]")
    experts, width = len(up), up.shape[1] // 2
    _check_matrix("gate_up_proj", up, up_scale, format, (experts, 2 * width, hidden))
    _check_matrix("down_proj", down, down_scale, format, (experts, hidden, width))
    if weights.shape != ids.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk shapes are {tuple(weights.shape)} and {tuple(ids.shape)}, but should be [T, k] both")
    for name, bias, columns in (("gate_up_bias", up_bias, 2 * width), ("down_bias", down_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (experts, columns):
            raise ValueError(f"{name} is {tuple(bias.shape)}, but should be {(experts, columns)}")
    fp8 = up.dtype == torch.float8_e4m3fn
    if fp8 and not interpreting() and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise NotImplementedError("codes of fp8 need a GPU of compute capability 8.9 or more")


@Repeated
def _experts(
    x: Tensor, up: Tensor, up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None, weights: Tensor,
    ids: Tensor, expert_map: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    format: str, activation: str, quantize: bool,
) -> Tensor:  # fmt: skip
    """The stage with every argument by position; `quantize`: activations become codes."""
    _check(x, up, up_scale, down, down_scale, weights, ids, up_bias, down_bias, format, activation, quantize)
    experts = len(up)
    if ids.numel() == 0 or up.numel() == 0 or down.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    spread = experts if expert_map is None else max(experts, expert_map.numel())
    slots = max(1, ids.numel() * experts // spread)  # of these the grids are made
    shape = Shape(experts, x.shape[1], up.shape[1] // 2, ids.shape[1], x.element_size())
    plan = plan_of(shape, format, slots, quantize, x.device)
    routing = Routing(ids, expert_map, *((None, None) if plan.few else align(ids, experts, expert_map)))
    rows = Rows(x)
    if plan.ahead and quantize:
        rows = quantise(x)
    elif plan.ahead and weavable(format, x.dtype):
        rows = weave(x)
    act = quantized_product(
        rows, Matrix(up, up_scale, up_bias, format), routing, plan.gate_up, slots, x.dtype,
        activation=activation, quantize=quantize, codes=quantize and plan.ahead and not plan.few,
    )  # fmt: skip
    second = Matrix(down, down_scale, down_bias, format)
    y = quantized_product(act, second, routing, plan.down, slots, x.dtype, quantize=quantize)
    return combine(y.values, weights, ids, experts, expert_map)


def quantized_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_proj: Tensor,
    down_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts, activations in their own dtype.

    Args:
        hidden_states: [T, H], fp32, fp16 or bf16.
        gate_up_proj: codes of [E, 2 * I, H] in `format`, gate rows first; gate_up_scale their scales.
        down_proj: codes of [E, H, I]; down_scale their scales.
        topk_weights, topk_ids: [T, k]; ids are local, or global where `expert_map` gives the local id or -1.
        format: plain, fp8_block, fp8_channel, int8_channel, int4_group or mxfp4.
        activation: silu, gelu_tanh or swiglu_oai.
        gate_up_bias, down_bias: [E, 2 * I] and [E, H], any floating dtype.

    Returns:
        New [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation.
        TypeError: other dtypes than those of the format.
        NotImplementedError: another format, tensors on the CPU without TRITON_INTERPRET=1, fp8 on an older GPU.
    """
    tensors = (
        hidden_states, gate_up_proj, gate_up_scale, down_proj, down_scale, topk_weights, topk_ids,
        None if expert_map is None else expert_map.contiguous(), gate_up_bias, down_bias,
    )  # fmt: skip
    return _experts(tensors, format, activation, False)


def fp8_group128(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_proj: Tensor,
    down_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """As `quantized_experts` for weights in fp8, with the rows of both products in fp8, 128 columns under one scale.

    A scale is the largest |x| of its columns over 448, and codes are rounded to nearest even.
    """
    tensors = (
        hidden_states, gate_up_proj, gate_up_scale, down_proj, down_scale, topk_weights, topk_ids,
        None if expert_map is None else expert_map.contiguous(), gate_up_bias, down_bias,
    )  # fmt: skip
    return _experts(tensors, format, activation, True)


quantized_experts.deterministic = True
quantized_experts.graph_capturable = True
quantized_experts.rounds = ("activation", "expert_output")
quantized_experts.formats = ("plain", *CODES)
fp8_group128.deterministic = True
fp8_group128.graph_capturable = True
fp8_group128.rounds = ("activation", "expert_output")
fp8_group128.formats = ("fp8_block", "fp8_channel")
fp8_group128.quantizes = "fp8_group128"
