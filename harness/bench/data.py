"""What the bench times: random batches of a model's layer, what each must cost at least, and whether a result is right.

Bytes count every input once (of the experts' weights those that the batch touches) and every output once; operations
are two per multiplication.  Calls of a batch rotate over sets of data that together exceed the cache: two sets of
weights, or two of what else is large.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.bounds import of_result
from moe_harness.harness.core.call import Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.contracts import Subject
from moe_harness.harness.core.stage import find_stage

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
class TimedBatch:
    """One number of tokens: the arguments of each call in turn, and what one call must cost at least."""

    stage: str
    calls: list[tuple[dict[str, Any], dict[str, Any]]]
    bytes: float
    flops: float
    rows: Tensor  # row numbers of the result that are compared
    fp8: bool = False  # whether the floor's operations are those of fp8 products


@dataclass(frozen=True)
class TimedLayer:
    """What is timed: a model's sparse layer (`fixtures.configs.ModelShape`), or one rank's part of its experts.

    `format`: how the weights are shipped, for a stage that has several.
    """

    model: Any
    ep_size: int = 1
    format: str = ""

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


Weights = list[Any]  # one entry a set: those of `TimedLayer.weights`, or what the stage's own `weights` gives


def sample(count: int, draw: Draw) -> Tensor:
    """Up to SAMPLE row numbers spread over a result."""
    return torch.linspace(0, count - 1, min(SAMPLE, count), device=draw.device).round().long().unique()


def problem(subject: Subject, batch: TimedBatch, results: list[Any]) -> str:
    """What is wrong with `results`, one for each call of the batch, on the sampled rows; "" if nothing is."""
    for (args, keywords), result in zip(batch.calls, results, strict=True):
        told = _malformed(batch, args, keywords, result) or _wrong(subject, batch, args, keywords, result)
        if told:
            return told
    return ""


def _malformed(batch: TimedBatch, args: dict[str, Any], keywords: dict[str, Any], result: Any) -> str:
    wanted = find_stage(batch.stage).outputs(Call(Case(), args, keywords))
    found = result if isinstance(result, tuple | list) else (result,)
    shapes = [tuple(getattr(value, "shape", ())) for value in found]
    if shapes != [output.shape for output in wanted]:
        return f"is wrong: returned shapes {shapes}, but should return {[output.shape for output in wanted]}"
    return ""


def _wrong(subject: Subject, batch: TimedBatch, args: dict[str, Any], keywords: dict[str, Any], result: Any) -> str:
    stage, declared = find_stage(batch.stage), subject.declared.rounds
    call = stage.cut(Call(Case(), args, keywords, declared=subject.declared), batch.rows)
    sampled, truth = of_result(result, batch.rows), stage.truth(call, declared)
    if not isinstance(truth, bounds.Bound):
        findings = stage.judge(call, sampled, declared).findings
        return f"is wrong: {findings[0].message}" if findings else ""
    worst = float(truth.z(sampled).abs().nan_to_num(nan=torch.inf).amax())
    limit = bounds.max_limit()
    return "" if worst <= limit else f"is wrong: {worst:.3g} sigma from the reference, the limit is {limit:.1f}"
