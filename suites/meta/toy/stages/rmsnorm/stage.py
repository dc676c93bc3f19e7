"""Its data, and what a right result is: a bound, a tensor of integers and an operand written in place."""

import torch
from moe_harness.harness.stages.rmsnorm.cases import RmsNormCase

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Builder, Call
from moe_harness.harness.core.stage import Declared, Output, Stage, Truth


class RmsNorm(Stage):
    """Root-mean-square norm."""

    def build(self, case: RmsNormCase, device: str) -> Call:
        draw = Builder(case, device)
        args = {
            "x": draw.place("x", draw.normal(case.T, case.H)),
            "weight": draw.place("weight", draw.normal(case.H)),
            "running": draw.place("running", draw.integers(0, 9, (case.H,)), torch.int64),
        }
        return Call(case, args, {"eps": 1e-6}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        x = call.args["x"]
        return [
            Output("the result", tuple(x.shape), x.dtype),
            Output("the largest", (len(x), 1), torch.int64),
            Output("running", tuple(call.args["running"].shape), torch.int64, inside="running"),
        ]

    def expect(self, call: Call, declared: Declared) -> tuple[Truth, ...]:
        x, weight, running = call.args.values()
        wide = x.double()
        squares = wide.square().mean(-1, keepdim=True) + call.keywords["eps"]
        value = wide / squares.sqrt() * weight.double()
        relative = bounds.accumulation(x.shape[-1]) + 4 * bounds.ACCUMULATOR**2
        variance = bounds.finish(value, value.square() * relative, x.dtype)
        sources = torch.full((len(x), 2), torch.inf, dtype=torch.float64)
        bound = bounds.Bound(value, variance, torch.zeros_like(variance), sources)
        return bound, wide.argmax(-1, keepdim=True), running + 1


STAGE = RmsNorm()
