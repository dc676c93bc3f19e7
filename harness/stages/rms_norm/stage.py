"""The stage `rms_norm`: data whose faults show, and the bound of a right result."""

from typing import Any

from torch import Tensor

from moe_harness.harness.core.call import Builder, Call
from moe_harness.harness.core.stage import Declared, Output, Stage, Truths
from moe_harness.harness.stages.rms_norm.bound import rms_norm_bound
from moe_harness.harness.stages.rms_norm.cases import RmsNormCase
from moe_harness.harness.stages.rms_norm.contract import ROUNDINGS


class RmsNorm(Stage):
    """Root mean square normalisation."""

    def build(self, case: RmsNormCase, device: str) -> Call:
        draw = Builder(case, device)
        lead = [int(size) for size in case.lead.split("x")] if case.lead else []
        if case.data == "exact":
            x, weight, residual = _exact(case, lead, draw)
        else:
            x, weight, residual = draw.large_normal(*lead, case.H).float() * 1.4, draw.normal(case.H) * 0.3 + 1, None
            if case.residual:
                residual = draw.large_normal(*lead, case.H).float() * 1.5
            x, residual = _special(case, x, residual)
            if case.data == "large_weight":  # else no result is beyond a few times the root of the width
                weight = weight * 2.0 ** (11 if case.dtype == "fp16" else 20)
        args = {"x": draw.place("x", x), "weight": draw.place("weight", weight)}
        added = None if residual is None else draw.place("residual", residual)
        return Call(case, args, {"eps": case.eps, "residual": added}, draw.arena)

    def outputs(self, call: Call) -> list[Output]:
        x = call.args["x"]
        out = Output("the result", tuple(x.shape), x.dtype)
        return [out] if call.keywords.get("residual") is None else [out, Output("the sum", tuple(x.shape), x.dtype)]

    def expect(self, call: Call, declared: Declared) -> Any:
        rounds = frozenset(ROUNDINGS if declared is None else declared)
        return rms_norm_bound(*call.args.values(), **call.keywords, rounds=rounds)

    def exact_value(self, call: Call) -> Truths:
        """In fp64: the mean of squares is 1 and eps 3, so everything is halved."""
        x, weight = (tensor.double() for tensor in call.args.values())
        residual = call.keywords["residual"]
        total = x if residual is None else x + residual.double()
        out = weight * total / 2
        return out if residual is None else (out, total)


STAGE = RmsNorm()


def _exact(case: RmsNormCase, lead: list[int], draw: Builder) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of 1 and -1, as sums of small integers where there is a residual."""
    weight = draw.integers(-100, 101, (case.H,)).to(draw.dtype) * 2
    total = draw.signs(*lead, case.H).to(draw.dtype)
    if not case.residual:
        return total, weight, None
    residual = draw.integers(-20, 21, (*lead, case.H)).to(draw.dtype)
    return total - residual, weight, residual


def _special(case: RmsNormCase, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows = x.view(-1, case.H)
    middle = len(rows) // 2
    if case.data in ("row_nan", "row_inf"):
        rows[middle, case.H // 3] = float(case.data.removeprefix("row_"))
    elif case.data == "zero_row":
        rows[middle] = 0.0
        if residual is not None:
            residual.view(-1, case.H)[middle] = 0.0
    elif case.data == "offset":
        x += 3.0
    elif case.data == "spike":
        rows[:, case.H // 2] = 300.0  # its square is beyond fp16
    elif case.data == "cancelling" and residual is not None:
        residual = 0.03 * residual - x
    scale = {"tiny": 2.0**-9, "huge": 2.0**10}.get(case.data, 1.0)  # mean squares of 4e-6 beside an eps of 1e-6
    x, residual = x * scale, None if residual is None else residual * scale
    if case.data == "outside_fp16":
        for part in (x, residual):
            if part is not None:
                part.view(-1, case.H)[::2] *= 2.0**17
                part.view(-1, case.H)[1::2] *= 2.0**-26
    return x, residual
