"""What the bench times: random batches of a model's layer, what each must cost at least, and whether a result is right.

Bytes count every input once (of the experts' weights those that the batch touches) and every output once; operations
are two per multiplication.  Calls of a batch rotate over sets of data that together exceed the cache: two sets of
weights, or two of what else is large.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import Subject
from moe_harness.harness.core.stage import stage_module

SETS = 2
SAMPLE = 16  # rows of each result that are compared with the reference


class Draw:
    """Random tensors on the device from a generator of its own.

    PyTorch's default generator takes part in every graph capture, and one that fails leaves it unusable.
    """

    def __init__(self, seed: int, device: str = "cuda"):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=self.device, dtype=dtype, generator=self.generator).mul_(scale)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, device=self.device, generator=self.generator)


@dataclass
class Batch:
    """One number of tokens: the arguments of each call in turn, and what one call must cost at least."""

    stage: str
    calls: list[tuple[dict[str, Any], dict[str, Any]]]
    bytes: float
    flops: float
    rows: Tensor  # row numbers of the result that are compared


@dataclass(frozen=True)
class Layer:
    """What is timed: a model's sparse layer (`fixtures.configs.ModelShape`), or one rank's part of its experts."""

    model: Any
    ep_size: int = 1

    @property
    def local(self) -> int:
        """Experts held by the rank, the first ones."""
        return self.model.num_experts // self.ep_size

    def weights(self, dtype: torch.dtype, draw: Draw) -> list[tuple[Tensor, Tensor]]:
        """SETS pairs of gate_up_proj and down_proj, scaled so that values keep their size."""
        h, i = self.model.hidden_size, self.model.intermediate_size
        return [
            (
                draw.normal(self.local, 2 * i, h, dtype=dtype, scale=h**-0.5),
                draw.normal(self.local, h, i, dtype=dtype, scale=i**-0.5),
            )
            for _ in range(SETS)
        ]


Weights = list[tuple[Tensor, Tensor]]


def _experts(layer: Layer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> Batch:
    """Uniform routing; on one rank of many, ids are global and a map gives the local ones."""
    model, local = layer.model, layer.local
    x = draw.normal(tokens, model.hidden_size, dtype=dtype)
    top = draw.uniform(tokens, model.num_experts).topk(model.top_k, dim=-1)
    expert_map = None
    if layer.ep_size > 1:
        expert_map = torch.full((model.num_experts,), -1, device=draw.device)
        expert_map[:local] = torch.arange(local, device=draw.device)
    here = top.indices[top.indices < local]
    routing = {"topk_weights": top.values.softmax(-1).to(dtype), "topk_ids": top.indices}
    calls = [
        ({"hidden_states": x, "gate_up_proj": up, "down_proj": down} | routing,
         {"activation": "silu", "expert_map": expert_map})
        for up, down in weights
    ]  # fmt: skip
    one = 3 * model.hidden_size * model.intermediate_size
    size = (len(here.unique()) * one + 2 * x.numel()) * x.element_size()
    return Batch("experts", calls, size, 2.0 * here.numel() * one, _rows(tokens, draw))


def _grouped_linear(layer: Layer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> Batch:
    """The experts' first product on its own: tokens * top_k sorted rows, [E, 2I, H]."""
    model, local = layer.model, layer.local
    ids = (draw.uniform(tokens * model.top_k) * local).long().clamp(max=local - 1)
    sizes = torch.bincount(ids, minlength=local)
    x = draw.normal(len(ids), model.hidden_size, dtype=dtype)
    calls = [({"x": x, "weight": up, "group_sizes": sizes}, {"bias": None}) for up, _ in weights]
    one = 2 * model.hidden_size * model.intermediate_size
    rows = len(ids) * (model.hidden_size + 2 * model.intermediate_size)
    size = (int((sizes > 0).sum()) * one + rows) * x.element_size()
    return Batch("grouped_linear", calls, size, 2.0 * len(ids) * one, _rows(len(ids), draw))


def _router(layer: Layer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> Batch:
    """The model's own rule; weights of four bytes and ids of eight are written."""
    model = layer.model
    keywords = {
        "top_k": model.top_k, "scoring": model.scoring, "renormalize": model.renormalize,
        "correction_bias": draw.uniform(model.num_experts) if model.correction_bias else None,
        "num_expert_group": model.num_expert_group, "topk_group": model.topk_group,
        "routed_scaling_factor": model.routed_scaling_factor,
    }  # fmt: skip
    logits = [draw.normal(tokens, model.num_experts, dtype=dtype) for _ in range(SETS)]
    size = logits[0].numel() * logits[0].element_size() + tokens * model.top_k * 12.0
    return Batch("router", [({"router_logits": x}, keywords) for x in logits], size, 0.0, _rows(tokens, draw))


def _shared_expert_gate(layer: Layer, tokens: int, dtype: torch.dtype, weights: Weights, draw: Draw) -> Batch:
    hidden = layer.model.hidden_size

    def call() -> tuple[dict[str, Any], dict[str, Any]]:
        x, shared = (draw.normal(tokens, hidden, dtype=dtype) for _ in range(2))
        gate = draw.normal(1, hidden, dtype=dtype, scale=hidden**-0.5)
        return {"hidden_states": x, "gate_weight": gate, "shared_output": shared}, {}

    calls = [call() for _ in range(2 * SETS)]  # four, or 8192 rows of 1024 would stay in the cache
    size = (3.0 * tokens + 1) * hidden * calls[0][0]["hidden_states"].element_size()
    return Batch("shared_expert_gate", calls, size, 0.0, _rows(tokens, draw))


BATCHES: dict[str, Callable[..., Batch]] = {
    "experts": _experts,
    "router": _router,
    "grouped_linear": _grouped_linear,
    "shared_expert_gate": _shared_expert_gate,
}


def _rows(count: int, draw: Draw) -> Tensor:
    """Up to SAMPLE row numbers spread over a result."""
    return torch.linspace(0, count - 1, min(SAMPLE, count), device=draw.device).round().long().unique()


def problem(subject: Subject, batch: Batch, results: list[Any]) -> str:
    """What is wrong with `results`, one for each call of the batch, on the sampled rows; "" if nothing is."""
    for (args, keywords), result in zip(batch.calls, results, strict=True):
        told = _malformed(batch, args, keywords, result) or _wrong(subject, batch, args, keywords, result)
        if told:
            return told
    return ""


def _malformed(batch: Batch, args: dict[str, Any], keywords: dict[str, Any], result: Any) -> str:
    wanted = stage_module(batch.stage).outputs(Call(Case(), args, keywords))
    found = result if isinstance(result, tuple | list) else (result,)
    shapes = [tuple(getattr(value, "shape", ())) for value in found]
    if shapes != [tuple(shape) for _, shape, _ in wanted]:
        return f"is wrong: returned shapes {shapes}, but should return {[tuple(shape) for _, shape, _ in wanted]}"
    return ""


def _wrong(subject: Subject, batch: Batch, args: dict[str, Any], keywords: dict[str, Any], result: Any) -> str:
    stage, declared = stage_module(batch.stage), subject.declared.rounds
    call = Call(Case(), _sampled(batch, args), keywords)
    if batch.stage == "router":
        findings = stage.compare(call, tuple(value[batch.rows] for value in result), declared).findings
        return f"is wrong: {findings[0].message}" if findings else ""
    worst = float(stage.expect(call, declared).z(result[batch.rows]).abs().nan_to_num(nan=torch.inf).amax())
    limit = bounds.max_limit()
    return "" if worst <= limit else f"is wrong: {worst:.3g} sigma from the reference, the limit is {limit:.1f}"


def _sampled(batch: Batch, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that give the sampled rows."""
    if batch.stage != "grouped_linear":
        whole = ("gate_up_proj", "down_proj", "gate_weight")
        return {name: value if name in whole else value[batch.rows] for name, value in args.items()}
    sizes = args["group_sizes"]
    of = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)[batch.rows]
    return args | {"x": args["x"][batch.rows], "group_sizes": torch.bincount(of, minlength=len(sizes))}
