"""vLLM's Marlin kernels for weights of four bits as implementations of the stage, to be timed beside others.

    moe-harness bench --stage quantized_experts --format int4_group --config qwen3-30b-a3b --impl triton \
        --impl moe_harness.suites.performance.marlin:int4

They want the weights in an order of their own, which a server makes once when it loads them.  So does this module, and
keeps what it made as long as the tensors live: weights that are changed in place would be read as they were, which is
why these are no adapters for `check`.  Read in vLLM 0.22.1.
"""

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.impls.foreign import refuse
from moe_harness.impls.vllm._common import of

HIDDEN, WIDTH = 256, 128  # vLLM fills up mxfp4's sizes to multiples of these


class Prepared(NamedTuple):
    """Weights, scales and biases of both products in Marlin's order."""

    up: Tensor
    down: Tensor
    up_scale: Tensor
    down_scale: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


_kept: dict[tuple[int, ...], tuple[list[Any], Prepared]] = {}


def _prepared(given: tuple[Tensor, ...], make: Callable[..., Prepared]) -> Prepared:
    """What was made of these tensors, or is made now."""
    key = tuple(t.data_ptr() for t in given)
    found = _kept.get(key)
    if found is None or any(t() is None for t in found[0]):
        found = _kept[key] = ([weakref.ref(t) for t in given], make(*given))
    return found[1]


def _int4(up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor) -> Prepared:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales

    def matrix(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        experts, rows, columns = codes.shape[0], codes.shape[1], codes.shape[2] * 2
        words = codes.view(torch.int32).transpose(1, 2).contiguous()
        order = torch.empty(experts, 0, dtype=torch.int32, device=codes.device)
        packed = ops.gptq_marlin_moe_repack(words, order, columns, rows, 4)
        return packed, marlin_moe_permute_scales(scale.transpose(1, 2).contiguous(), columns, rows, 128)

    (up, up_scale), (down, down_scale) = matrix(up, up_scale), matrix(down, down_scale)
    return Prepared(up, down, up_scale, down_scale, None, None)


def _filled(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros behind it up to `sizes`."""
    out = x.new_zeros(sizes)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


def _in_turn(x: Tensor) -> Tensor:
    """Rows of gate and up [E, 2 * I, ...] in turn: vLLM's activation of gpt-oss reads them so."""
    return torch.stack(x.chunk(2, 1), 2).flatten(1, 2)


def _mxfp4(
    up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor, up_bias: Tensor, down_bias: Tensor, *,
    dtype: torch.dtype,
) -> Prepared:  # fmt: skip
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin

    experts, hidden, width = len(up), _up(down.shape[1], HIDDEN), _up(up.shape[1] // 2, WIDTH)
    rows = [
        _filled(_in_turn(up), experts, 2 * width, hidden // 2), _filled(down, experts, hidden, width // 2),
        _filled(_in_turn(up_scale), experts, 2 * width, hidden // 32),
        _filled(down_scale, experts, hidden, width // 32),
        _filled(_in_turn(up_bias), experts, 2 * width), _filled(down_bias, experts, hidden),
    ]  # fmt: skip
    return Prepared(*prepare_moe_mxfp4_layer_for_marlin(SimpleNamespace(params_dtype=dtype), *rows))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _run(x: Tensor, kept: Prepared, weights: Tensor, ids: Tensor, kind: str, activation: str, experts: int) -> Tensor:
    from vllm.scalar_type import scalar_types

    return of("experts.marlin_moe", "fused_marlin_moe")(
        x, kept.up, kept.down, kept.up_bias, kept.down_bias, kept.up_scale, kept.down_scale, weights.float(), ids.int(),
        quant_type_id=getattr(scalar_types, kind).id, global_num_experts=experts,
        activation=of("activation", "MoEActivation")(activation),
    )  # fmt: skip


def int4(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor,
    down_proj: Tensor,
    down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Marlin for int4_group without biases and maps."""
    refuse("the bench of Marlin in int4", expert_map=expert_map, gate_up_bias=gate_up_bias, down_bias=down_bias)
    kept = _prepared((gate_up_proj, gate_up_scale, down_proj, down_scale), _int4)
    return _run(hidden_states, kept, topk_weights, topk_ids, "uint4b8", activation, len(gate_up_proj))


def mxfp4(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor,
    down_proj: Tensor,
    down_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: str,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Marlin for mxfp4 with the biases and the activation of gpt-oss."""
    refuse("the bench of Marlin in mxfp4", expert_map=expert_map)
    given = (gate_up_proj, gate_up_scale, down_proj, down_scale, gate_up_bias, down_bias)
    kept = _prepared(given, partial(_mxfp4, dtype=hidden_states.dtype))
    hidden = kept.up.shape[1] * 16
    x = hidden_states if hidden == hidden_states.shape[1] else _filled(hidden_states, len(hidden_states), hidden)
    out = _run(x, kept, topk_weights, topk_ids, "float4_e2m1f", "swigluoai", len(gate_up_proj))
    return out[:, : hidden_states.shape[1]]


int4.devices = mxfp4.devices = ("cuda",)  # type: ignore[attr-defined]
int4.dtypes = mxfp4.dtypes = ("fp16", "bf16")  # type: ignore[attr-defined]
int4.formats = ("int4_group",)  # type: ignore[attr-defined]
mxfp4.formats = ("mxfp4",)  # type: ignore[attr-defined]
