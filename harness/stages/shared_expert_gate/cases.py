"""Cases of the stage `shared_expert_gate`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, in_shapes, layouts
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

LEADS = ("1", "7", "33", "2x3", "5x1x4", "0", "129", "2x0x3", "", "1x1x1x6", "1024")
SPECIALS = (
    "row_nan", "row_inf", "output_nan", "tiny", "huge", "cancelling", "saturated", "saturated_off", "outside_fp16",
)  # fmt: skip
LAWS = ("row_permutation", "batch_split", "row_alone", "power_of_two", "additivity", "reshape")
OPERANDS = ("hidden_states", "gate_weight", "shared_output")


@dataclass(frozen=True, kw_only=True)
class GateCase(Case):
    stage: ClassVar[str] = "shared_expert_gate"
    lead: str = "16"  # leading dimensions, "2x3" is [2, 3, ...]; empty for none
    H: int = 64
    D: int = 64

    def rows(self) -> int:
        return prod(int(size) for size in self.lead.split("x") if size)

    def part(self) -> str:
        """A kernel for [T, H] alone is whole in itself."""
        return f"{'any leading dimensions' if 'x' in self.lead or not self.lead else 'two dimensions'}, {self.dtype}"

    def resized(self) -> Self:
        return self.but(lead="7", H=self.H + 8, D=self.D + 8, seed=self.seed + 1)


CaseType = GateCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": in_shapes(_special(request), {"lead": "2x9", "H": 96, "D": 24}, {"lead": "33", "H": 32, "D": 64}),
        "laws": crossed(GateCase, lead="24", H=48, D=40, variant=LAWS, dtype=request.dtypes),
        "determinism": _memory(request),
        "batch_invariance": _memory(request),
        "leak": [GateCase(lead="512", H=64, D=256, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        for lead in ("5", "0", "2x3", ""):
            yield GateCase(lead=lead, dtype=dtype, optional=not lead)


def _exact(request: Request) -> Iterator[Case]:
    axes = {
        "lead": LEADS,
        "H": request.pick(at.WIDTHS, at.WIDTHS_FULL),
        "D": request.pick(at.INNER, at.INNER_FULL),
        "dtype": request.dtypes,
    }
    for row in pairwise(axes, request.seed):
        yield GateCase(data="exact", optional=not row["lead"], **row)
    for rows in at.TOKENS:
        yield GateCase(lead=str(rows), H=32, D=48, data="exact", dtype=request.dtypes[rows % len(request.dtypes)])
    for width in (1024, 2048, 4096, 4100, 7168):
        yield GateCase(lead="3", H=width, D=width, data="exact", dtype=request.dtypes[-1])
    for rows in at.TOKENS_MANY:
        yield GateCase(lead=str(rows), H=16, D=16, data="exact", dtype=request.dtypes[rows % len(request.dtypes)])
    yield GateCase(lead="33000", H=8, D=8, data="exact", dtype=request.dtypes[-1])
    for place, rows in enumerate((*at.TOKENS_TURNING, at.TOKENS_BEYOND_16_BITS)):
        dtype = request.dtypes[place % len(request.dtypes)]
        yield GateCase(lead=str(rows), H=16, D=24, data="exact", dtype=dtype)
        yield GateCase(lead=f"{rows // 8}x8", H=24, D=8, data="exact", dtype=dtype)
    for place, lead in enumerate(("1", "7", "33", "2x3", "130", "1409", "5x1x4")):
        dtype = request.dtypes[place % len(request.dtypes)]
        yield GateCase(lead=lead, H=40, D=21 + 12 * (place % 2), data="exact", dtype=dtype, variant="poisoned")
    for place, width in enumerate(at.WIDTHS_BEYOND_4096):
        dtype = request.dtypes[place % len(request.dtypes)]
        yield GateCase(lead="33", H=width, D=16, data="exact", dtype=dtype)
        yield GateCase(lead="17", H=16, D=width, data="exact", dtype=dtype)
    yield from crossed(GateCase, lead=("33001", "5x8003"), H=8, D=16, data="exact", dtype=request.dtypes[0])


def _numeric(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        for lead, width, depth in (
            ("33", 256, 96),
            ("2x5", 1024, 130),
            ("129", 33, 257),
            ("4", 2048, 2048),
            ("64", 7, 8),
        ):
            yield GateCase(lead=lead, H=width, D=depth, dtype=dtype)
    axes = {"lead": LEADS[:-1], "H": (1, 16, 33, 129, 256), "D": (1, 5, 24, 63, 130), "dtype": request.dtypes}
    for row in pairwise(axes, request.seed + 1):
        yield GateCase(optional=not row["lead"], **row)
    many_dimensions = ("2x1x3x1x2", "2x2x1x3x2x2")  # more than a kernel may have arguments for
    yield from crossed(GateCase, lead=many_dimensions, H=24, D=16, dtype=request.dtypes[0])
    for shape in request.configs:
        yield GateCase(lead="33", H=shape.hidden_size, D=shape.hidden_size, dtype=request.dtypes[-1])


def _layouts(request: Request) -> Iterator[Case]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            for dtype in request.dtypes:
                yield GateCase(
                    lead="1" if kind == "unit" else "13", H=37, D=21, layout=f"{operand}:{kind}", dtype=dtype
                )
                yield GateCase(lead="2x1x5", H=40, D=24, layout=f"{operand}:{kind}", dtype=dtype)

    for kind in at.LAYOUTS[:5]:  # rows == H == D
        for operand in (*OPERANDS, "all"):
            yield GateCase(lead="32", H=32, D=32, layout=f"{operand}:{kind}", dtype=request.dtypes[-1])
    for operand, lead, width, depth in (
        ("hidden_states", "29", 1, 24), ("shared_output", "29", 24, 1), ("all", "1x29", 24, 1), ("all", "29x1", 1, 1),
        ("gate_weight", "29", 40, 24), ("all", "1", 24, 40),
    ):  # fmt: skip
        laid_out = layouts((operand,), at.LAYOUTS_OF_ONE)
        yield from crossed(
            GateCase, lead=lead, H=width, D=depth, layout=laid_out, data="exact", dtype=request.dtypes[-1]
        )
    by_tokens = layouts(("hidden_states", "shared_output", "all"), ("permuted",))  # sequences
    yield from crossed(GateCase, layout=by_tokens, lead=("3x4", "2x3x5"), H=40, D=24, dtype=request.dtypes[0])


def _memory(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield GateCase(lead="33", H=128, D=40, dtype=dtype)
        yield GateCase(lead="3x4", H=33, D=17, dtype=dtype)
    yield from crossed(GateCase, lead=("1", "2x3x4", "2x1x2x3"), H=32, D=24, dtype=request.dtypes[-1])


def _special(request: Request) -> Iterator[Case]:
    for data in SPECIALS:
        yield from crossed(GateCase, lead="12", H=64, D=33, data=data, dtype=request.dtypes_of(data))
    for lead, width, depth in (("12", 64, 33), ("2x3", 264, 16), ("33", 1040, 8)):
        yield from crossed(GateCase, lead=lead, H=width, D=depth, data="deep_sums", dtype=request.narrow())


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    small = crossed(GateCase, lead=("1", "33"), H=256, D=256, dtype=request.dtypes)
    large = [GateCase(lead="1050000", H=2056, D=2056, dtype=request.dtypes[-1])]
    return on_cuda(small, large)
