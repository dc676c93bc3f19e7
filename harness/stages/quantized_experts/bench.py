"""What the bench times of the stage `quantized_experts`: weights as codes, so that bytes are a half or a quarter."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.bench.data import SETS, Draw, TimedBatch, TimedLayer, sample
from moe_harness.harness.stages.quantized_experts.contract import BENCHED
from moe_harness.harness.stages.quantized_experts.encoding import FP8, LARGEST, scale_shape
from moe_harness.reference.quantized_experts import MX_BIAS

# The root mean square of codes: drawn as normals of that size, or as bytes of which every code is as likely.
SIZE = {"plain": 1.0, "fp8_block": 64.0, "fp8_channel": 64.0, "int8_channel": 40.0, "int4_group": 4.6, "mxfp4": 2.9}
ACTIVATIONS = {"swiglu_clamped": "swiglu_oai", "gelu_pytorch_tanh": "gelu_tanh"}


class Matrices(NamedTuple):
    """One of the two weights of all local experts: codes [E, N, K] and scales as the format has them."""

    codes: Tensor
    scale: Tensor | None

    def bytes(self) -> int:
        """Of one expert."""
        scale = 0 if self.scale is None else self.scale[0].nbytes
        return self.codes[0].nbytes + scale


def weights(layer: TimedLayer, dtype: torch.dtype, draw: Draw) -> list[tuple[Matrices, Matrices]]:
    """SETS pairs of gate_up and down, scaled so that values keep their size."""
    h, i = layer.model.hidden_size, layer.model.intermediate_size
    format = layer.format or BENCHED
    return [
        (_matrices(layer.local, 2 * i, h, format, dtype, draw), _matrices(layer.local, h, i, format, dtype, draw))
        for _ in range(SETS)
    ]


def _matrices(experts: int, rows: int, columns: int, format: str, dtype: torch.dtype, draw: Draw) -> Matrices:
    if format == "plain":
        return Matrices(draw.normal(experts, rows, columns, dtype=dtype, scale=columns**-0.5), None)
    # One by one: in fp32 they would take four times the room.  As bytes: not every torch stacks fp8.
    drawn = [_codes(rows, columns, format, draw) for _ in range(experts)]
    codes = torch.stack([one.view(torch.uint8) for one in drawn]).view(drawn[0].dtype)
    doublings = draw.uniform(experts, *scale_shape(format, rows, columns)) - 0.5
    scale = columns**-0.5 / SIZE[format] * doublings.exp2()
    if format == "mxfp4":
        return Matrices(codes, (scale.log2().round() + MX_BIAS).to(torch.uint8))
    return Matrices(codes, scale.to(dtype) if format == "int4_group" else scale)


def _codes(rows: int, columns: int, format: str, draw: Draw) -> Tensor:
    if format in ("int4_group", "mxfp4"):
        return (draw.uniform(rows, columns // 2) * 256).to(torch.uint8)
    normal = draw.normal(rows, columns, dtype=torch.float32, scale=SIZE[format])
    return (
        normal.round().clamp(-127, 127).to(torch.int8)
        if format == "int8_channel"
        else normal.clamp(-LARGEST, LARGEST).to(FP8)
    )


def batch(
    layer: TimedLayer, tokens: int, dtype: torch.dtype, weights: list[tuple[Matrices, Matrices]], draw: Draw
) -> TimedBatch:
    """Uniform routing; on one rank of many, ids are global and a map gives the local ones.  gpt-oss has its biases.

    The floor takes products of fp8 for weights in fp8, and those of `dtype` otherwise.
    """
    model, local, format = layer.model, layer.local, layer.format or BENCHED
    x = draw.normal(tokens, model.hidden_size, dtype=dtype)
    top = draw.uniform(tokens, model.num_experts).topk(model.top_k, dim=-1)
    act = ACTIVATIONS.get(model.activation, "silu")
    keywords: dict[str, Any] = {"format": format, "activation": act, "expert_map": None}
    if layer.ep_size > 1:
        expert_map = torch.full((model.num_experts,), -1, device=draw.device)
        expert_map[:local] = torch.arange(local, device=draw.device)
        keywords["expert_map"] = expert_map
    sizes = {"gate_up_bias": 2 * model.intermediate_size, "down_bias": model.hidden_size}
    for name, columns in sizes.items():
        keywords[name] = draw.normal(local, columns, dtype=dtype) if act == "swiglu_oai" else None
    here = top.indices[top.indices < local]
    routing: dict[str, Any] = {"topk_weights": top.values.softmax(-1).to(dtype), "topk_ids": top.indices}
    calls = [
        ({"hidden_states": x, "gate_up_proj": up.codes, "gate_up_scale": up.scale, "down_proj": down.codes,
          "down_scale": down.scale} | routing, keywords)
        for up, down in weights
    ]  # fmt: skip
    size = len(here.unique()) * sum(matrices.bytes() for matrices in weights[0]) + 2 * x.nbytes
    flops = 2.0 * here.numel() * 3 * model.hidden_size * model.intermediate_size
    return TimedBatch("quantized_experts", calls, size, flops, sample(tokens, draw), format.startswith("fp8"))
