"""Cases of the stage `rms_norm`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, in_shapes, layouts
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

LEADS = ("1", "7", "33", "2x3", "5x1x4", "0", "129", "2x0x3", "", "300")
SPECIALS = (
    "row_nan", "row_inf", "zero_row", "tiny", "huge", "offset", "spike", "cancelling", "outside_fp16", "large_weight",
)  # fmt: skip
LAWS = ("row_permutation", "batch_split", "row_alone", "weight_times_four", "scale_with_eps", "residual_swapped",
        "sum_then_norm")  # fmt: skip
OPERANDS = ("x", "weight", "residual")
HEADS = (64, 80, 96, 128, 256)  # widths of a head, which queries and keys are normalised over
MODELS = (1024, 2048, 2560, 4096, 5120, 7168)  # hidden sizes
EPS = (1e-6, 1e-5, 1e-3)


@dataclass(frozen=True, kw_only=True)
class RmsNormCase(Case):
    stage: ClassVar[str] = "rms_norm"
    lead: str = "16"  # leading dimensions, "2x3" is [2, 3, ...]; empty for none
    H: int = 64
    residual: bool = False
    eps: float = 1e-6

    def rows(self) -> int:
        return prod(int(size) for size in self.lead.split("x") if size)

    def part(self) -> str:
        return f"{'with' if self.residual else 'without'} residual, {self.dtype}"

    def resized(self) -> Self:
        return self.but(lead="7", H=self.H + 8, seed=self.seed + 1)


CaseType = RmsNormCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": in_shapes(_special(request), {"lead": "3x7", "H": 128}, {"lead": "33", "H": 32}),
        "laws": _laws(request),
        "determinism": _memory(request),
        "batch_invariance": [c for c in _memory(request) if not c.residual and "x" not in c.lead],
        "leak": [RmsNormCase(lead="512", H=256, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[RmsNormCase]:
    for dtype in request.dtypes:
        for lead in ("5", "0", "2x3", ""):
            yield RmsNormCase(lead=lead, dtype=dtype, optional=not lead)
        yield RmsNormCase(lead="5", dtype=dtype, residual=True)
        yield RmsNormCase(lead="5", dtype=dtype, variant="defaults")


def _exact(request: Request) -> Iterator[RmsNormCase]:
    """In 16 bits, where they are asked for: there the last digit of a root in fp32 does not matter."""
    for number, width in enumerate((1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096)):
        for dtype in [d for d in request.dtypes if d != "fp32"] or request.dtypes:
            lead = ("3", "17", "2x5", "1")[number % 4]
            yield RmsNormCase(lead=lead, H=width, eps=3.0, data="exact", residual=bool(number % 2), dtype=dtype)
            yield RmsNormCase(lead=lead, H=width, eps=3.0, data="exact", residual=not number % 2, dtype=dtype)


def _numeric(request: Request) -> Iterator[RmsNormCase]:
    for width in request.pick((128, 2048), (*HEADS, *MODELS)):
        lead = "9" if width > 256 else "9x4"
        yield from crossed(RmsNormCase, lead=lead, H=width, dtype=request.dtypes, residual=(False, True))
    axes = {
        "lead": LEADS,
        "H": request.pick(at.WIDTHS, at.WIDTHS_FULL),
        "residual": (False, True),
        "eps": EPS,
        "dtype": request.dtypes,
    }
    for row in pairwise(axes, request.seed):
        yield RmsNormCase(optional=not row["lead"], **row)
    for rows in at.TOKENS:
        yield RmsNormCase(
            lead=str(rows), H=48, residual=bool(rows % 2), dtype=request.dtypes[rows % len(request.dtypes)]
        )
    for rows in (1023, 1025, 8193):
        yield RmsNormCase(lead=str(rows), H=16, dtype=request.dtypes[-1], residual=bool(rows % 2))
    for shape in request.configs:
        yield RmsNormCase(lead="9", H=shape.hidden_size, residual=True, dtype=request.dtypes[-1])
    for place, width in enumerate((*at.WIDTHS_BEYOND_4096, 16_384)):  # wider than one block of a kernel
        dtype = request.dtypes[place % len(request.dtypes)]
        yield RmsNormCase(lead="2", H=width, residual=place % 2 == 0, dtype=dtype)
    yield RmsNormCase(lead=str(at.TOKENS_BEYOND_16_BITS), H=2, dtype=request.dtypes[-1])
    yield from crossed(RmsNormCase, lead="12", H=65, data="tiny", residual=(False, True), eps=0.0,
                       dtype=request.dtypes[0])  # fmt: skip
    for place, width in enumerate((24, 40, 100)):  # a lost tail of 16 looked like odd widths
        yield RmsNormCase(lead="9", H=width, dtype=request.dtypes[place % len(request.dtypes)])


def _layouts(request: Request) -> Iterator[RmsNormCase]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            for dtype in request.dtypes:
                lead = "1" if kind == "unit" else "13"
                yield RmsNormCase(lead=lead, H=37, residual=True, layout=f"{operand}:{kind}", dtype=dtype)
            yield RmsNormCase(lead="2x1x5", H=40, residual=operand == "residual", layout=f"{operand}:{kind}")
    yield from crossed(RmsNormCase, lead="7", H=64, residual=True, layout=layouts(OPERANDS, at.LAYOUTS[:5]))
    for lead in ("3x4", "2x3x5"):  # heads by tokens
        for operand, residual in (("x", False), ("residual", True), ("all", True)):
            yield RmsNormCase(lead=lead, H=40, residual=residual, layout=f"{operand}:permuted")


def _memory(request: Request) -> list[RmsNormCase]:
    cases = crossed(RmsNormCase, lead="33", H=128, dtype=request.dtypes, residual=(False, True))
    return [*cases, RmsNormCase(lead="3x4", H=33, residual=True, dtype=request.dtypes[-1])]


def _special(request: Request) -> Iterator[RmsNormCase]:
    for data in SPECIALS:
        dtypes = request.dtypes_of(data)
        yield from crossed(RmsNormCase, lead="12", H=65, data=data, dtype=dtypes, residual=(False, True))


def _laws(request: Request) -> Iterator[RmsNormCase]:
    for law in LAWS:
        added = True if law in ("residual_swapped", "sum_then_norm") else (False, True)
        shape: dict[str, Any] = {"lead": "24", "H": 48, "eps": 2.0**-10}
        yield from crossed(RmsNormCase, variant=law, dtype=request.dtypes, residual=added, **shape)


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    small = crossed(RmsNormCase, lead=("1", "33"), H=2048, residual=(False, True), dtype=request.dtypes)
    large = [RmsNormCase(lead="1050000", H=2056, dtype=request.dtypes[-1])]
    return on_cuda(small, large)
