"""Cases of the stage `experts`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, in_shapes, layouts, tile_steps
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

ROUTINGS = ("uniform", "one", "skewed", "duplicates", "last")
MASKS = ("none", "some", "rows")
MAPS = ("none", "alternate", "block")
# T * k * H * I at most: an implementation may gather the weights of every row, three times as many, and widen them.
MOST_GATHERED = 20_000_000
OPERANDS = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "topk_ids", "expert_map")
SPECIALS = (
    "token_nan", "token_inf", "expert_nan", "expert_inf", "down_inf", "unused_expert_nan", "tiny", "huge", "cancelling",
    "signed_weights", "outside_fp16",
)  # fmt: skip
# In 32s, as `_special` says, and an even number of experts, which cancel in pairs.
SPECIAL_SHAPES = ({"T": 33, "H": 32, "I": 64, "E": 10, "k": 3}, {"T": 7, "H": 96, "I": 32, "k": 4})
LAWS = (
    "token_permutation", "expert_relabelling", "slot_permutation", "batch_split", "row_alone", "weight_linearity",
    "power_of_two", "masked_is_zero_weight", "duplicates_add", "padding_zero", "padding_nan", "padding_huge",
    "unused_expert_removed", "tiny_weights",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExpertsCase(Case):
    stage: ClassVar[str] = "experts"
    T: int = 16
    H: int = 64
    I: int = 48  # noqa: E741 - the field's own letter
    E: int = 8  # global experts; with a map about half of them are local
    k: int = 2
    activation: str = "silu"
    routing: str = "uniform"
    masked: str = "none"
    map: str = "none"
    weights: str = "fp32"  # dtype of topk_weights: fp32, or model (that of the activations)
    ints: str = "int64"  # dtype of topk_ids and expert_map

    def rows(self) -> int:
        return self.T * self.k

    def shows(self) -> bool:
        return self.rows() > 0 and self.masked != "all"

    def steps(self) -> int:
        return tile_steps(self.rows(), self.E, self.H, self.I)

    def core(self) -> bool:
        plain = self.activation == "silu" and self.masked == self.map == "none" and self.ints == "int64"
        return super().core() and plain

    def resized(self) -> Self:
        return self.but(T=2 * self.T + 1, H=self.H + 8, I=self.I + 8, seed=self.seed + 1)


CaseType = ExpertsCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "sentinels": _sentinels(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": [*in_shapes(_special(request), *SPECIAL_SHAPES), *_partial_sums(request), *_deep_sums(request)],
        "laws": _laws(request),
        "determinism": _repeats(request),
        "batch_invariance": _repeats(request),
        "leak": [ExpertsCase(T=64, H=256, I=32, E=4, k=2, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[Case]:
    empty: Iterator[dict[str, Any]] = cycle(({}, {"H": 48, "I": 40}, {"H": 80, "I": 24}))
    for dtype in request.dtypes:
        yield ExpertsCase(T=5, dtype=dtype)
        yield ExpertsCase(T=0, dtype=dtype, **next(empty))
        yield ExpertsCase(T=7, dtype=dtype, variant="defaults")
        yield ExpertsCase(T=7, dtype=dtype, weights="model")
        yield ExpertsCase(T=7, dtype=dtype, ints="int32", optional=True)
        yield ExpertsCase(T=0, E=3, k=3, dtype=dtype, map="alternate")
        yield ExpertsCase(T=6, E=4, k=4, dtype=dtype)
        yield ExpertsCase(T=6, E=1, k=1, H=16, I=8, dtype=dtype)
        yield ExpertsCase(T=9, dtype=dtype, activation="gelu_tanh")


def _axes(request: Request) -> dict[str, tuple]:
    pairs = (*at.RELEASED_EXPERTS, *at.ODD_EXPERTS)
    return {
        "experts": pairs,
        "H": request.pick(at.WIDTHS, at.WIDTHS_FULL),
        "I": request.pick(at.INNER, at.INNER_FULL),
        "dtype": request.dtypes,
        "routing": ROUTINGS,
        "masked": MASKS,
        "map": MAPS,
        "weights": ("fp32", "model"),
        "activation": ("silu", "gelu_tanh"),
    }


def _from_rows(rows: list[dict], tokens: Iterator[int], **fixed: Any) -> Iterator[Case]:
    for row in rows:
        experts, top_k = row.pop("experts")
        most = max(1, MOST_GATHERED // (top_k * row["H"] * row["I"]))
        yield ExpertsCase(T=min(next(tokens), most), E=experts, k=top_k, **row, **fixed)


def _exact(request: Request) -> Iterator[Case]:
    pairs = cycle((*at.RELEASED_EXPERTS[:4], (4, 2), *at.RELEASED_EXPERTS[4:], (7, 3)))
    plain: dict[str, Any] = {"data": "exact", "H": 32, "I": 24}
    for tokens in at.TOKENS:  # a kernel chosen by T, by dtype
        for dtype in request.dtypes:
            experts, top_k = next(pairs)
            yield ExpertsCase(T=tokens, E=experts, k=top_k, dtype=dtype, **plain)
    for experts, top_k in (*at.RELEASED_EXPERTS, *at.ODD_EXPERTS):
        some = request.pick((3, 4, 40), (1, 3, 4, 16, 40, 64, 200))
        yield from crossed(ExpertsCase, T=some, E=experts, k=top_k, dtype=request.dtypes[-1], **plain)
    tokens = request.shuffled(at.TOKENS[1:])
    yield from _from_rows(pairwise(_axes(request), request.seed), tokens, data="exact")
    last = request.dtypes[-1]
    for width, inner in ((64, 64), (64, 32), (16, 16), (32, 16), (100, 50), (48, 48)):  # square, and 2I == H
        yield ExpertsCase(T=21, H=width, I=inner, data="exact", dtype=last)
    for tokens, dtype in zip(at.TOKENS_MANY, cycle(request.dtypes)):  # noqa: B905 - dtypes repeat
        yield ExpertsCase(T=tokens, H=16, I=16, E=8, k=2, data="exact", dtype=dtype)
    around = (4095, 4096, 4097)  # T * k around 2^15
    yield from crossed(ExpertsCase, T=around, H=8, I=8, E=8, k=8, data="exact", dtype=last)
    yield ExpertsCase(T=33_000, H=4, I=8, E=2, k=1, routing="one", data="exact", dtype=last)
    yield ExpertsCase(T=9, H=8, I=4104, E=3, data="exact", dtype=last)
    yield ExpertsCase(T=9, H=4104, I=8, E=3, data="exact", dtype=last)
    yield ExpertsCase(T=140, H=520, I=264, E=4, data="exact", dtype=last)
    yield ExpertsCase(T=60, H=8, I=8, E=1030, k=8, data="exact", dtype=last)  # ids of more than 10 bits
    if request.profile != "quick":
        yield ExpertsCase(T=65537, H=4, I=8, E=4, k=1, data="exact", dtype=last)
        yield ExpertsCase(T=16384, H=8, I=16, E=256, k=8, data="exact", dtype=last)
    for shape in request.configs:
        for tokens in request.pick((1, 4, 33), (1, 2, 3, 4, 8, 16, 33, 64, 129)):
            yield _of_model(request, shape, T=tokens, data="exact")
    yield from _turning(request)


def _turning(request: Request) -> Iterator[Case]:
    """Sizes at which published kernels turned wrong, each in several shapes; exact, so that one row is enough."""
    small: dict[str, Any] = {"H": 16, "I": 16, "data": "exact"}
    dtypes = cycle(request.dtypes)
    for experts, top_k in at.LARGE_K:
        for tokens in (1, 5, 40, 257):
            yield ExpertsCase(T=tokens, E=experts, k=top_k, dtype=next(dtypes), **small)
    for experts in at.EXPERTS_MANY:
        for tokens, routing, kind in ((3, "last", "none"), (40, "last", "none"), (60, "uniform", "none"),
                                      (130, "last", "alternate"), (33, "uniform", "block")):  # fmt: skip
            yield ExpertsCase(T=tokens, E=experts, k=8, routing=routing, map=kind, dtype=next(dtypes), **small)
    pairs = cycle(((8, 2), (128, 8), (60, 4), (64, 6)))
    for tokens in at.TOKENS_TURNING:
        for routing in ("uniform", "skewed", "last"):
            experts, top_k = next(pairs)
            yield ExpertsCase(T=tokens, E=experts, k=top_k, routing=routing, dtype=next(dtypes), **small)
    for experts, top_k in ((8, 2), (5, 3)):
        tiny: dict[str, Any] = {"H": 4, "I": 8, "data": "exact", "dtype": next(dtypes)}
        yield ExpertsCase(T=at.TOKENS_BEYOND_16_BITS, E=experts, k=top_k, **tiny)
    for experts, top_k, tokens in ((4, 4, 128), (16, 8, 256), (2, 1, 256), (4, 2, 256), (32, 4, 1024)):
        yield ExpertsCase(T=tokens, E=experts, k=top_k, dtype=next(dtypes), **small)  # 128 rows an expert on average
    for width, tokens in zip(at.WIDTHS_BEYOND_4096, (2, 17, 33, 5), strict=True):
        yield ExpertsCase(T=tokens, H=width, I=8, E=3, data="exact", dtype=next(dtypes))
        yield ExpertsCase(T=tokens, H=8, I=width, E=3, data="exact", dtype=next(dtypes))
    for tokens, experts, top_k, width, inner in (
        (1, 8, 2, 32, 24), (5, 128, 8, 33, 17), (33, 6, 3, 40, 24), (17, 60, 4, 64, 64), (130, 16, 4, 21, 33),
        (257, 300, 8, 24, 40), (2, 256, 8, 48, 16),
    ):  # fmt: skip
        for masked, kind in (("none", "none"), ("rows", "block"), ("some", "alternate")):
            fields: dict[str, Any] = {"H": width, "I": inner, "masked": masked, "map": kind, "data": "exact"}
            dtype = next(dtypes)
            yield ExpertsCase(T=tokens, E=experts, k=top_k, dtype=dtype, variant="poisoned", **fields)
    for tokens, top_k in ((5, 3), (3, 4), (33, 3), (70, 8), (129, 4)):
        yield ExpertsCase(T=tokens, E=8, k=top_k, routing="crowded", dtype=next(dtypes), **small)
    # each of two experts with more rows than 16 bits count
    yield ExpertsCase(T=66_000, H=4, I=8, E=4, k=2, routing="one", data="exact", dtype=next(dtypes))


def _numeric(request: Request) -> Iterator[Case]:
    for activation in ("silu", "gelu_tanh"):
        for dtype in request.dtypes:
            either: dict[str, Any] = {"weights": ("fp32", "model"), "dtype": dtype, "activation": activation}
            yield from crossed(ExpertsCase, T=64, H=192, I=96, k=3, **either)
            yield ExpertsCase(T=48, H=1024, I=384, E=4, dtype=dtype, activation=activation)
            # rows enough that one more rounding in the running sum shows
            yield ExpertsCase(T=600, H=96, I=48, E=16, k=8, dtype=dtype, activation=activation, weights="model")
            yield ExpertsCase(T=33, H=130, I=257, E=16, k=4, dtype=dtype, activation=activation)
            yield ExpertsCase(T=1, H=128, I=48, k=3, dtype=dtype, activation=activation)
            yield ExpertsCase(T=4, H=512, I=200, E=128, k=8, dtype=dtype, activation=activation)
    axes = _axes(request) | {"H": request.pick((16, 33, 96, 256), at.WIDTHS_FULL)}
    axes |= {"I": request.pick((24, 63, 130), at.INNER_FULL)}
    axes["experts"] = (*at.RELEASED_EXPERTS[: request.pick(3, 8)], (3, 2), (5, 5), (1, 1))
    yield from _from_rows(pairwise(axes, request.seed + 1), request.shuffled(at.TOKENS_FEW))
    for shape in request.configs:
        for tokens in request.pick((1, 17), (1, 4, 17, 64, 129)):
            yield _of_model(request, shape, T=tokens)
    for dtype in request.dtypes:
        few = (2, 3, 4)  # of few partial sums each weighs little: many elements show one that is rounded too often
        yield from crossed(ExpertsCase, T=1200, H=96, I=32, E=8, k=few, dtype=dtype, weights="model")
    for width, inner, experts, top_k in ((256, 64, 16, 4), (80, 40, 6, 2)):  # a single token may take another way
        for dtype in (request.dtypes[0], request.dtypes[-1]):
            yield ExpertsCase(T=1, H=width, I=inner, E=experts, k=top_k, dtype=dtype, activation="gelu_tanh")


def _of_model(request: Request, shape: Any, **fields: Any) -> Case:
    fields = {"H": shape.hidden_size, "I": shape.intermediate_size, "E": shape.num_experts, "k": shape.top_k} | fields
    return ExpertsCase(dtype=request.dtypes[-1], map=request.map_for(shape), **fields)


def _sentinels(request: Request) -> Iterator[Case]:
    axes = {"data": ("exact", "normal"), "masked": ("some", "rows", "all", "one"), "map": MAPS, "dtype": request.dtypes}
    yield from crossed(ExpertsCase, **axes, T=19, E=6, k=3)
    for kind in MAPS:
        yield ExpertsCase(T=19, E=6, k=3, routing="duplicates", masked="some", map=kind, data="exact")
        yield ExpertsCase(T=1, E=128, k=8, masked="some", map=kind, data="exact", dtype=request.dtypes[-1])
        yield ExpertsCase(T=130, E=9, k=4, masked="some", map=kind, data="exact", ints="int32", optional=True)
    for tokens, experts, top_k in ((5, 4, 2), (33, 16, 4)):  # nothing to do, in other shapes
        yield ExpertsCase(T=tokens, E=experts, k=top_k, masked="all", data="exact", dtype=request.dtypes[-1])


def _layouts(request: Request) -> Iterator[Case]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            for dtype in request.pick(request.dtypes[-1:], request.dtypes):
                fields: dict[str, Any] = {"T": 1, "E": 1, "k": 1, "I": 1} if kind == "unit" else {"T": 13, "E": 5}
                kind_of_map = "alternate" if operand == "expert_map" else "none"
                yield ExpertsCase(
                    layout=f"{operand}:{kind}", data="exact", map=kind_of_map, dtype=dtype, H=40, **{"I": 24} | fields
                )
    for kind in at.LAYOUTS[:3]:  # widths that end inside a block, so that what lies behind a row is in reach
        for dtype in request.dtypes:
            odd: dict[str, Any] = {"T": 13, "H": 37, "I": 21, "dtype": dtype, "data": "exact"}
            yield from crossed(ExpertsCase, layout=layouts(OPERANDS[:3], (kind,)), **odd)
            yield ExpertsCase(layout=f"all:{kind}", map="block", **odd)

    yield from _odd_strides(request)


def _odd_strides(request: Request) -> Iterator[Case]:
    """Strides that a shape hides: those of square weights, and those of a dimension of size 1 among many rows."""
    for width, inner in ((32, 32), (32, 16), (48, 48)):  # I == H, 2I == H: transposed, a matrix fits as it is
        laid_out, dtype = layouts((*OPERANDS[:3], "all"), at.LAYOUTS[:5]), request.dtypes[-1 if width == 32 else 0]
        yield from crossed(ExpertsCase, T=33, H=width, I=inner, layout=laid_out, data="exact", dtype=dtype)
    flat: dict[str, dict[str, int]] = {
        "hidden_states": {"H": 1}, "gate_up_proj": {"E": 1, "k": 1}, "down_proj": {"I": 1}, "topk_weights": {"k": 1},
        "topk_ids": {"k": 1}, "all": {"T": 1},
    }  # fmt: skip
    for operand, sizes in flat.items():
        for kind in at.LAYOUTS_OF_ONE:
            for others in ("", "all"):
                shape: dict[str, Any] = {"T": 29, "H": 24, "I": 16, "E": 5} | sizes
                layout = f"{others or operand}:{kind}"
                yield ExpertsCase(layout=layout, data="exact", dtype=request.dtypes[-1], **shape)


def _memory(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield ExpertsCase(T=9, dtype=dtype)
        yield ExpertsCase(T=33, H=72, I=40, E=16, k=4, dtype=dtype, masked="rows")
        yield ExpertsCase(T=12, H=24, I=16, E=64, k=1, dtype=dtype, map="block")
        yield ExpertsCase(T=80, H=33, I=17, E=6, k=2, dtype=dtype, map="alternate", routing="skewed")
    for tokens, experts, top_k in ((17, 12, 3), (40, 5, 2)):  # every slot live
        yield ExpertsCase(T=tokens, H=48, I=24, E=experts, k=top_k, dtype=request.dtypes[0])


def _special(request: Request) -> Iterator[Case]:
    for variant in SPECIALS:
        for dtype in request.dtypes_of(variant):
            # Widths in 32s: elsewhere the CPU's own bf16 product lets a NaN spread (harness.core.memory tells how).
            yield ExpertsCase(T=20, I=32, E=6, k=2, dtype=dtype, data=variant)
            if dtype == request.dtypes[-1] and variant in ("token_nan", "token_inf", "unused_expert_nan"):
                few = (1, 2, 3, 5)  # their way may be another one
                yield from crossed(ExpertsCase, T=few, I=32, E=6, k=2, dtype=dtype, data=variant)
            if request.profile != "quick":
                width, inner = (130, 65) if request.device == "cuda" else (128, 64)
                yield ExpertsCase(T=130, H=width, I=inner, E=16, k=4, dtype=dtype, data=variant)


def _partial_sums(request: Request) -> Iterator[Case]:
    # a single token, and many, may be summed elsewhere than the others
    shapes = ((17, 6, 2), (5, 8, 2), (40, 16, 3), (9, 7, 4), (33, 60, 4), (21, 128, 8), (1, 12, 6), (300, 9, 5))
    for tokens, experts, top_k in shapes:
        sizes = {"T": tokens, "H": 48, "I": 24, "E": experts, "k": top_k}
        yield from crossed(ExpertsCase, **sizes, dtype=request.dtypes, data="partial_sums")


def _deep_sums(request: Request) -> Iterator[Case]:
    shapes = ((5, 64, 48, 8, 2), (33, 136, 264, 6, 3), (1, 1040, 40, 4, 2), (17, 40, 1032, 4, 2), (140, 2056, 16, 3, 1),
              (3, 16, 4104, 3, 2), (64, 256, 512, 4, 2))  # fmt: skip
    for tokens, width, inner, experts, top_k in shapes:
        sizes = {"T": tokens, "H": width, "I": inner, "E": experts, "k": top_k}
        yield from crossed(ExpertsCase, **sizes, dtype=request.dtypes, data="deep_sums")


def _laws(request: Request) -> Iterator[Case]:
    for law in LAWS:
        for dtype in request.pick(request.dtypes[:1] + request.dtypes[-1:], request.dtypes):
            yield ExpertsCase(T=18, H=64, I=32, E=9, k=3, dtype=dtype, variant=law)
            yield ExpertsCase(T=70, H=32, I=32, E=32, k=4, dtype=dtype, variant=law)


def _repeats(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield ExpertsCase(T=37, H=128, I=96, E=8, k=4, dtype=dtype)
        yield ExpertsCase(T=5, H=256, I=64, E=16, k=8, dtype=dtype)
    turning = (65, 130, 257)  # where another tile, or a product split over K, may begin
    yield from crossed(ExpertsCase, T=turning, H=128, I=96, E=4, k=3, dtype=request.dtypes[0])
    yield ExpertsCase(T=130, H=128, I=96, E=4, k=1, dtype=request.dtypes[0], routing="last")


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    last = request.dtypes[-1]
    sizes: dict[str, Any] = {"H": 256, "I": 128, "E": 16, "k": 4}
    small = [*crossed(ExpertsCase, T=(1, 8, 64), dtype=request.dtypes, map=("none", "block"), **sizes)]
    # what is captured may be a simpler way than what is called
    small += crossed(ExpertsCase, T=(1, 64), dtype=last, activation="gelu_tanh", masked="some", **sizes)
    # 2^31 elements are passed in the weights, in the activations and in the routed rows; 5 to 13 GB each.
    large = [
        ExpertsCase(T=16, H=4096, I=1024, E=300, k=8, routing="last", data="exact", dtype=last),
        ExpertsCase(T=1_050_000, H=2056, I=16, E=4, k=1, data="exact", dtype=last),
        ExpertsCase(T=300_000, H=64, I=520, E=8, k=8, data="exact", dtype=last),
    ]
    return on_cuda(small, large)
