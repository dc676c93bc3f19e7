"""A right implementation of the stage `quantized_experts` whose every step can be replaced; holds no fault itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.emulation import matmul
from moe_harness.harness.stages.experts.faults._steps import combine, halves, locate

TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


class Matrix(NamedTuple):
    """One expert's matrix as it is stored."""

    codes: Tensor
    scale: Tensor | None
    format: str
    first: bool  # gate and up, or down


def nibbles(codes: Tensor) -> Tensor:
    """int64 [N, K] of uint8 [N, K / 2], the low four bits first."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()


def numbers(matrix: Matrix) -> Tensor:
    """The codes as fp32 numbers, without their scales."""
    if matrix.format == "int4_group":
        return (nibbles(matrix.codes) - 8).float()
    if matrix.format == "mxfp4":
        return e2m1(nibbles(matrix.codes))
    return matrix.codes.float()


def e2m1(codes: Tensor, table: tuple[float, ...] = TABLE) -> Tensor:
    """The values of four-bit codes."""
    return torch.tensor([*table, *(-value for value in table)], device=codes.device)[codes]


def spread(scale: Tensor | None, matrix: Matrix, block: int = 128, group: int = 32) -> Tensor:
    """The scales over the elements of the matrix, fp32; `scale` as stored."""
    rows, columns = numbers(matrix).shape
    if scale is None:
        return torch.ones(rows, columns, device=matrix.codes.device)
    n, k = torch.arange(rows, device=scale.device), torch.arange(columns, device=scale.device)
    if matrix.format in ("fp8_channel", "int8_channel"):
        return scale.float()[n, None].expand(rows, columns)
    if matrix.format == "fp8_block":
        return scale.float()[_within(n // block, scale, 0)[:, None], _within(k // block, scale, 1)]
    if matrix.format == "int4_group":
        return scale.float()[n[:, None], _within(k // block, scale, 1)]
    return (scale.float() - 127).exp2()[n[:, None], _within(k // group, scale, 1)]


def _within(index: Tensor, scale: Tensor, dim: int) -> Tensor:
    return index.clamp(max=scale.shape[dim] - 1)


def real(matrix: Matrix) -> Tensor:
    """What the matrix stands for, in fp32."""
    return numbers(matrix) * spread(matrix.scale, matrix)


def as_they_are(rows: Tensor, first: bool) -> Tensor:
    """Rows that enter a product, where activations are not quantised."""
    return rows


def quantised(
    rows: Tensor, to: torch.dtype = torch.float8_e4m3fn, width: int | None = None, scale: Tensor | None = None
) -> Tensor:
    """Rows [n, K] as codes of `to` times a scale for each `width` columns (None: each row), or the one given."""
    columns = rows.shape[-1]
    across = width or columns
    groups = F.pad(rows, (0, -columns % across)).unflatten(-1, (-1, across))
    if scale is None:
        scale = groups.abs().amax(-1, keepdim=True) / LARGEST[to]
    codes = groups / torch.where(scale == 0, 1.0, scale)
    codes = codes.round().clamp(-128, 127) if to == torch.int8 else codes.clamp(-448, 448).to(to)
    return (codes.float() * scale).flatten(-2)[..., :columns]


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The hidden values of the contract."""
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    return act(gate, activation) * up


def act(gate: Tensor, activation: str) -> Tensor:
    """silu or gelu_tanh."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def plus(rows: Tensor, bias: Tensor | None, expert: int, first: bool) -> Tensor:
    """Rows of a product with the expert's bias."""
    return rows if bias is None else rows + bias[expert].float()


class Steps(NamedTuple):
    """The steps that round: an implementation with other roundings has others."""

    glu: Callable[[Tensor, Tensor, str], Tensor] = glu
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] = combine


RIGHT = Steps()


def run(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_proj: Tensor,
    down_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    steps: Steps = RIGHT,
    real: Callable[[Matrix], Tensor] = real,
    entering: Callable[[Tensor, bool], Tensor] = as_they_are,
    plus: Callable[[Tensor, Tensor | None, int, bool], Tensor] = plus,
    split: Callable[[Tensor], tuple[Tensor, Tensor]] = halves,
    glu: Callable[[Tensor, Tensor, str], Tensor] | None = None,
    second: Callable[[Tensor, Tensor], Tensor] = matmul,
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    locate: Callable[[Tensor, Tensor | None], Tensor] = locate,
    scale_of: Callable[[int], int] = lambda expert: expert,
) -> Tensor:
    """fp32 sums, one rounding at the end; every keyword after `steps` replaces one of the steps."""
    glu, combine = glu or steps.glu, combine or steps.combine
    ids = locate(topk_ids, expert_map)
    slots = torch.zeros(*ids.shape, hidden_states.shape[1], device=hidden_states.device)
    for expert in ids[ids >= 0].unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        matrices = [
            Matrix(codes[expert], None if scale is None else scale[scale_of(expert)], format, first)
            for codes, scale, first in ((gate_up_proj, gate_up_scale, True), (down_proj, down_scale, False))
        ]
        rows = plus(entering(hidden_states[tokens].float(), True) @ real(matrices[0]).T, gate_up_bias, expert, True)
        gate, up = split(rows)
        hidden = entering(glu(gate, up, activation), False)
        slots[tokens, places] = plus(second(hidden, real(matrices[1])), down_bias, expert, False)
    return combine(slots, topk_weights, ids).to(hidden_states.dtype)


def arguments(call: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those that are left out too."""
    names = (
        "hidden_states", "gate_up_proj", "gate_up_scale", "down_proj", "down_scale", "topk_weights", "topk_ids",
        "format", "activation", "expert_map", "gate_up_bias", "down_bias",
    )  # fmt: skip
    left_out = {"activation": "silu", "expert_map": None, "gate_up_bias": None, "down_bias": None}
    return left_out | dict(zip(names, call, strict=False)) | options
