"""Cases of the stage `grouped_linear`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, in_shapes, layouts, tile_steps
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

SIZES = ("random", "sparse", "first", "last", "even", "ones")
SPECIALS = (
    "row_nan", "row_inf", "expert_nan", "expert_inf", "unused_expert_nan", "tiny", "huge", "cancelling", "outside_fp16",
)  # fmt: skip
LAWS = ("row_permutation", "expert_relabelling", "batch_split", "row_alone", "power_of_two", "additivity",
        "empty_expert_inserted")  # fmt: skip
OPERANDS = ("x", "weight", "group_sizes", "bias")


@dataclass(frozen=True, kw_only=True)
class GroupedLinearCase(Case):
    stage: ClassVar[str] = "grouped_linear"
    S: int = 40
    K: int = 64
    N: int = 48
    E: int = 8
    sizes: str = "random"  # one of SIZES, or the rows of each expert, "5+7+3", E of them that sum to S
    bias: bool = False
    ints: str = "int64"

    def rows(self) -> int:
        return self.S

    def steps(self) -> int:
        return tile_steps(self.S, self.E, self.K, self.N)

    def core(self) -> bool:
        return super().core() and not self.bias

    def resized(self) -> Self:
        return self.but(S=2 * self.S + 1, K=self.K + 8, N=self.N + 8, seed=self.seed + 1)


CaseType = GroupedLinearCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": in_shapes(_special(request), {"S": 70, "K": 32, "E": 5}, {"S": 9, "K": 96, "N": 32, "E": 3}),
        "laws": _laws(request),
        "determinism": _memory(request),
        "batch_invariance": _memory(request),
        "leak": [GroupedLinearCase(S=256, K=32, N=256, E=4, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield GroupedLinearCase(dtype=dtype)
        yield GroupedLinearCase(S=0, dtype=dtype)
        yield GroupedLinearCase(dtype=dtype, variant="defaults")
        yield GroupedLinearCase(dtype=dtype, bias=True)
        yield GroupedLinearCase(dtype=dtype, ints="int32", optional=True)
        yield GroupedLinearCase(S=5, E=1, dtype=dtype)


def _axes(request: Request) -> dict[str, tuple]:
    return {
        "S": (1, 2, 3, 4, 8, 17, 33, 64, 65, 129, 257),
        "K": request.pick(at.WIDTHS, at.WIDTHS_FULL),
        "N": request.pick(at.INNER, at.INNER_FULL),
        "E": (1, 2, 3, 7, 8, 60, 128, 257),
        "sizes": SIZES,
        "bias": (False, True),
        "dtype": request.dtypes,
    }


def _exact(request: Request) -> Iterator[Case]:
    for rows in at.TOKENS:
        yield GroupedLinearCase(S=rows, K=32, N=24, data="exact", dtype=request.dtypes[rows % len(request.dtypes)])
    for row in pairwise(_axes(request), request.seed):
        yield GroupedLinearCase(data="exact", **row)
    for width, inner in ((64, 64), (16, 16), (33, 33), (4104, 8), (8, 4104), (520, 264)):
        yield GroupedLinearCase(S=70, K=width, N=inner, E=3, data="exact", dtype=request.dtypes[-1])
    many = (*at.TOKENS_MANY, 32767, 32769, *request.pick((), (70001,)))
    yield from crossed(GroupedLinearCase, S=many, K=8, N=8, E=5, data="exact", dtype=request.dtypes[-1])
    for shape in request.configs:
        for rows in (8, 65):
            yield _of_model(request, shape, S=rows, data="exact")
    yield from _turning(request)


def _turning(request: Request) -> Iterator[Case]:
    """Sizes at which published kernels turned wrong."""
    dtypes = cycle(request.dtypes)
    for experts in at.EXPERTS_MANY:
        for sizes, rows in (("last", 40), ("sparse", 300), ("random", 70), ("ones", 1409)):
            yield GroupedLinearCase(
                S=rows, K=16, N=16, E=experts, sizes=sizes, bias=rows == 70, data="exact", dtype=next(dtypes)
            )
    for rows in at.TOKENS_TURNING:
        for sizes in ("random", "sparse", "even"):
            yield GroupedLinearCase(S=rows, K=16, N=16, E=7, sizes=sizes, data="exact", dtype=next(dtypes))
    for sizes in ("random", "even"):
        yield GroupedLinearCase(
            S=at.TOKENS_BEYOND_16_BITS, K=8, N=8, E=5, sizes=sizes, data="exact", dtype=next(dtypes)
        )
    for rows, width, inner in ((1, 32, 24), (17, 33, 40), (70, 64, 21), (257, 16, 16), (1409, 8, 8)):
        for sizes in ("sparse", "last", "random"):
            fields: dict[str, Any] = {"K": width, "N": inner, "E": 9, "sizes": sizes, "data": "exact"}
            yield GroupedLinearCase(S=rows, dtype=next(dtypes), variant="poisoned", **fields)
    for width, rows in zip(at.WIDTHS_BEYOND_4096, (2, 17, 33, 70), strict=True):
        yield GroupedLinearCase(S=rows, K=width, N=8, E=3, data="exact", dtype=next(dtypes))
        yield GroupedLinearCase(S=rows, K=8, N=width, E=3, bias=True, data="exact", dtype=next(dtypes))
    yield GroupedLinearCase(S=33_001, K=16, N=8, E=3, data="exact", dtype=next(dtypes))
    for experts in (1, 64):
        yield GroupedLinearCase(S=0, K=24, N=40, E=experts, data="exact", dtype=next(dtypes))
    for sizes in ("first", "last"):  # all rows in one group
        yield GroupedLinearCase(
            S=at.TOKENS_BEYOND_16_BITS, K=8, N=8, E=3, sizes=sizes, bias=True, data="exact", dtype=next(dtypes)
        )


def _of_model(request: Request, shape: Any, **fields: Any) -> Case:
    ranks = int(request.map_for(shape).removeprefix("rank").replace("none", "1"))
    return GroupedLinearCase(K=shape.hidden_size, N=2 * shape.intermediate_size, E=max(1, shape.num_experts // ranks),
                             dtype=request.dtypes[-1], **fields)  # fmt: skip


def _numeric(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        for bias in (False, True):
            yield GroupedLinearCase(S=129, K=512, N=96, E=6, dtype=dtype, bias=bias)
            yield GroupedLinearCase(S=33, K=130, N=257, E=16, dtype=dtype, bias=bias, sizes="sparse")
            yield GroupedLinearCase(S=7, K=2048, N=40, E=4, dtype=dtype, bias=bias)
    axes = _axes(request) | {"K": request.pick((1, 16, 33, 96, 256), at.WIDTHS_FULL), "E": (1, 3, 8, 60)}
    for row in pairwise(axes, request.seed + 1):
        yield GroupedLinearCase(**row)
    for shape in request.configs:
        yield _of_model(request, shape, S=33)
    for width in at.WIDTHS_BEYOND_4096:  # where a sum is split, its parts are not stored in 16 bits
        yield from crossed(GroupedLinearCase, S=9, K=width, N=24, E=3, dtype=request.dtypes, bias=width % 2 == 1)


def _layouts(request: Request) -> Iterator[Case]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            for dtype in request.dtypes:
                shape: dict[str, Any] = {"S": 1, "E": 1, "N": 1} if kind == "unit" else {"S": 30, "E": 5, "N": 21}
                yield GroupedLinearCase(
                    layout=f"{operand}:{kind}", K=37, data="exact", dtype=dtype, bias=operand == "bias", **shape
                )

    for kind in at.LAYOUTS[:5]:  # square, where strides of one operand fit another
        either = layouts(("x", "weight"), (kind,))
        square: dict[str, Any] = {"S": 32, "K": 32, "N": 32, "E": 3, "data": "exact"}
        yield from crossed(GroupedLinearCase, dtype=request.dtypes, layout=either, **square)
    of_either = layouts(("x", "weight"), at.LAYOUTS[:5])
    rows = (64, 70, 130)  # enough of them for a path that sorts or tiles
    yield from crossed(GroupedLinearCase, S=rows, K=37, N=24, E=3, layout=of_either, data="exact")
    flat: dict[str, dict[str, int]] = {"x": {"K": 1}, "weight": {"E": 1}, "bias": {"N": 1}, "all": {"S": 1}}
    for operand, sizes in flat.items():
        for kind in at.LAYOUTS_OF_ONE:
            for layout in dict.fromkeys((f"{operand}:{kind}", f"all:{kind}")):
                fields: dict[str, Any] = {"S": 29, "K": 24, "N": 16, "E": 4, "bias": True, "data": "exact"} | sizes
                yield GroupedLinearCase(layout=layout, dtype=request.dtypes[-1], **fields)
    for number, width in ((7, 40), (48, 16), (24, 24)):  # results as wide as x
        yield GroupedLinearCase(S=number, K=width, N=width, E=3, layout="x:transposed", data="exact")
    for experts, inner in ((3, 24), (7, 7)):  # columns by experts
        yield GroupedLinearCase(S=40, K=32, N=inner, E=experts, layout="weight:permuted", data="exact")


def _memory(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield GroupedLinearCase(S=33, K=128, N=40, dtype=dtype)
        yield GroupedLinearCase(S=50, K=33, N=17, E=20, sizes="sparse", bias=True, dtype=dtype)
    for fields in ({"S": 1, "E": 3}, {"S": 18, "E": 1}, {"S": 18, "E": 5, "sizes": "last"}):  # one product is enough
        yield GroupedLinearCase(K=32, N=24, dtype=request.dtypes[-1], **fields)


def _special(request: Request) -> Iterator[Case]:
    for data in SPECIALS:
        yield from crossed(GroupedLinearCase, S=24, data=data, sizes="sparse", dtype=request.dtypes_of(data))


def _laws(request: Request) -> Iterator[Case]:
    for law in LAWS:
        bias = law not in ("power_of_two", "additivity")
        yield from crossed(GroupedLinearCase, S=40, K=48, N=32, dtype=request.dtypes, variant=law, bias=bias)


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    small = crossed(GroupedLinearCase, S=(1, 8, 64), K=256, N=128, dtype=request.dtypes)
    large = [
        GroupedLinearCase(S=40, K=4096, N=2048, E=300, sizes="last", data="exact", dtype=request.dtypes[-1]),
        GroupedLinearCase(S=1_100_000, K=2048, N=16, E=3, data="exact", dtype=request.dtypes[-1]),
    ]
    return on_cuda(small, large)
