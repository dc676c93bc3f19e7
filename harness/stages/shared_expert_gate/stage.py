"""The stage `shared_expert_gate`: data whose faults show, and the bound of a right result."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.call import Builder, Call
from moe_harness.harness.core.stage import Declared, Output, Stage
from moe_harness.harness.stages.shared_expert_gate.bound import gate_bound
from moe_harness.harness.stages.shared_expert_gate.cases import GateCase

END = {"fp32": 4096.0, "fp16": 4096.0, "bf16": 512.0}  # 16 bits hold that in steps of 4
SATURATED = 110.0  # sigmoid(110) is 1 and sigmoid(-110) is 0 in fp32; exp(110) overflows there


class SharedExpertGate(Stage):
    """The gate of the shared expert."""

    batched = ("hidden_states", "shared_output")

    def build(self, case: GateCase, device: str) -> Call:
        draw = Builder(case, device)
        lead = [int(size) for size in case.lead.split("x")] if case.lead else []
        if case.data == "exact":
            hidden, weight, shared = _exact(case, lead, draw)
        else:
            hidden = draw.large_normal(*lead, case.H)
            weight = draw.normal(1, case.H, scale=1.5 * case.H**-0.5)
            shared = draw.large_normal(*lead, case.D)
            _make_special(case, hidden, weight, shared)
        args = {
            "hidden_states": draw.place("hidden_states", hidden),
            "gate_weight": draw.place("gate_weight", weight),
            "shared_output": draw.place("shared_output", shared),
        }
        return Call(case, args, {}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        hidden, _, shared = call.args.values()
        return [Output("the result", tuple(shared.shape), hidden.dtype)]

    def expect(self, call: Call, declared: Declared) -> bounds.Bound:
        return gate_bound(*call.args.values(), declared=declared)

    def exact_value(self, call: Call) -> Tensor:
        """In fp64: logits are 0 or beyond saturation, so gates are 1/2, 1 or 0."""
        hidden, weight, shared = (tensor.double() for tensor in call.args.values())
        logit = hidden @ weight.T
        return torch.where(logit == 0, 0.5, (logit > 0).double()) * shared

    def place_of(self, call: Call, row: int, column: int) -> dict[str, Any]:
        return {"row": row, "column": column}

    def row_groups(self, call: Call) -> dict[str, Tensor]:
        return {}


STAGE = SharedExpertGate()


def _exact(case: GateCase, lead: list[int], draw: Builder) -> tuple[Tensor, Tensor, Tensor]:
    """Logits 0 or +-128 and beyond from the last column and one more, each of which decides some rows alone.

    At -128 every way to write a sigmoid gives 0 in fp32 (at -104 some leave a subnormal), and halves of the even
    integers are integers.  Two columns that always pulled the same way would hide that one of them is not read; in the
    middle row the last one pulls alone, so that a single row shows it too.
    """
    hidden = draw.integers(-4, 5, (*lead, case.H)).to(draw.dtype)
    weight = torch.zeros(1, case.H)
    other = int(draw.integers(0, case.H, (1,)))
    weight[0, other] += 32.0
    weight[0, -1] += 32.0
    for column in (other, case.H - 1):
        hidden[..., column] = draw.integers(-1, 2, tuple(lead)) * 4.0
    rows = hidden.view(-1, case.H)
    for column, pull in ((other, 0.0), (case.H - 1, 4.0)):
        rows[len(rows) // 2 : len(rows) // 2 + 1, column] = pull
    return hidden, weight, draw.integers(-100, 101, (*lead, case.D)).to(draw.dtype) * 2


def _make_special(case: GateCase, hidden: Tensor, weight: Tensor, shared: Tensor) -> None:
    rows = hidden.view(-1, case.H)
    if case.data in ("row_nan", "row_inf"):
        rows[len(rows) // 2, case.H // 3] = float(case.data.removeprefix("row_"))
    elif case.data == "output_nan":
        shared.view(-1, case.D)[len(rows) // 2, 1] = float("nan")
    elif case.data == "tiny":
        shared *= 2.0**-8
    elif case.data == "huge":
        shared *= 2.0**10
    elif case.data == "outside_fp16":
        shared[::2] *= 2.0**17
        shared[1::2] *= 2.0**-26
    elif case.data == "cancelling":
        hidden[..., 1::2] = hidden[..., 0::2][..., : hidden[..., 1::2].shape[-1]]
        weight[..., 1::2] = -0.9375 * weight[..., 0::2][..., : weight[..., 1::2].shape[-1]]
    elif case.data == "deep_sums":  # ends that cancel: a part of the dot product does not fit into 16 bits
        hidden[..., 0] = hidden[..., -1] = 1.0
        weight[0, 0], weight[0, -1] = END[case.dtype], -END[case.dtype]
    elif case.data in ("saturated", "saturated_off"):
        sign = 1.0 if case.data == "saturated" else -1.0
        weight.fill_(0.0)
        weight[0, -1] = sign * SATURATED
        hidden[..., -1] = hidden[..., -1].abs() + 1.0
