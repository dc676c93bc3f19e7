"""Cases of the stage `router`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, layouts
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

LAWS = ("token_permutation", "expert_relabelling", "batch_split", "row_alone", "softmax_shift", "scale_is_linear")
SPECIALS = (
    "nan_row", "nan_element", "inf", "minus_inf", "ties", "constant", "peaked", "negative", "far_negative", "underflow",
    "overflow",
)  # fmt: skip
# Ways to route of released models that `_models` has not.
MORE_WAYS: tuple[dict[str, Any], ...] = (
    {"E": 256, "k": 8},  # Qwen3.5
    {"E": 64, "k": 8, "renorm": False},  # OLMoE
    {"E": 128, "k": 1, "scoring": "sigmoid", "renorm": False},  # Llama 4
    {"E": 128, "k": 8, "scoring": "sigmoid", "bias": "small"},  # GLM-4.5
    {"E": 256, "k": 8, "scoring": "sigmoid", "bias": "small"},  # MiniMax-M2
)
GROUPS = ("none", "8x4", "4x2", "2x1", "1x1", "8x3")
BIASES = ("none", "small", "negative", "offset", "zero")  # and "low", beneath what masks hold


@dataclass(frozen=True, kw_only=True)
class RouterCase(Case):
    stage: ClassVar[str] = "router"
    T: int = 16
    E: int = 128
    k: int = 8
    scoring: str = "softmax"
    renorm: bool = True
    bias: str = "none"
    groups: str = "none"  # "8x4": num_expert_group x topk_group
    scale: float = 1.0

    def rows(self) -> int:
        return self.T

    def core(self) -> bool:
        return super().core() and self.groups == self.bias == "none" and self.scoring == "softmax"

    def resized(self) -> Self:
        return self.but(T=2 * self.T + 1, seed=self.seed + 1)


CaseType = RouterCase


def allowed(row: dict[str, Any]) -> bool:
    """Whether the contract defines this combination: groups divide E, hold enough experts, and two each with a bias."""
    if row["groups"] == "none":
        return True
    experts, top_k = row["experts"]
    groups, best = map(int, row["groups"].split("x"))
    size = experts // groups
    if row["scoring"] == "sigmoid" and row["bias"] == "none":
        return False  # the contract names a group's score for softmax, and for a correction bias
    return experts % groups == 0 and best * size >= top_k and (size >= 2 or row["bias"] == "none")


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "routing": _routing(request),
        "special": _special(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "laws": _laws(request),
        "determinism": [*_memory(request), *_ties()],
        "batch_invariance": _memory(request),
        "leak": [RouterCase(T=2048, E=64, k=8, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield RouterCase(dtype=dtype)
        yield RouterCase(T=0, dtype=dtype)
        yield RouterCase(T=9, E=60, k=4, dtype=dtype, variant="defaults")
        yield RouterCase(T=3, E=4, k=4, dtype=dtype)
        yield RouterCase(T=3, E=1, k=1, dtype=dtype)
        yield RouterCase(T=0, E=64, k=8, groups="8x4", bias="small", scoring="sigmoid", dtype=dtype)
    yield RouterCase(T=0, E=5, k=3, renorm=False, dtype=request.dtypes[-1])


def _models(request: Request) -> Iterator[dict[str, Any]]:
    """The routing of each released family."""
    yield {"E": 8, "k": 2}
    yield {"E": 60, "k": 4, "renorm": False}
    yield {"E": 128, "k": 8}
    yield {"E": 512, "k": 10}
    yield {"E": 64, "k": 6, "renorm": False, "scale": 16.0, "groups": "8x3"}
    yield {"E": 160, "k": 6, "renorm": False, "scale": 16.0, "groups": "8x3"}
    yield {"E": 256, "k": 8, "scoring": "sigmoid", "bias": "small", "groups": "8x4", "scale": 2.5}
    yield {"E": 256, "k": 8, "scoring": "sigmoid", "bias": "negative", "groups": "8x4", "scale": 2.5}
    yield {"E": 256, "k": 8, "scoring": "sigmoid", "bias": "offset", "groups": "8x4", "scale": 2.5}
    yield {"E": 384, "k": 8, "scoring": "sigmoid", "bias": "offset", "groups": "1x1", "scale": 2.872}
    yield {"E": 32, "k": 4}
    for shape in request.configs:
        yield _of_model(shape)


def _of_model(shape: Any) -> dict[str, Any]:
    grouped = shape.num_expert_group is not None and shape.num_expert_group > 1
    return {
        "E": shape.num_experts, "k": shape.top_k, "scoring": shape.scoring, "renorm": shape.renormalize,
        "scale": float(shape.routed_scaling_factor), "bias": "small" if shape.scoring == "sigmoid" else "none",
        "groups": f"{shape.num_expert_group}x{shape.topk_group}" if grouped else "none",
    }  # fmt: skip


def _routing(request: Request) -> Iterator[Case]:
    for fields in _models(request):
        tokens_of = request.pick((1, 3, 33), (1, 2, 3, 4, 33, 65, 257))
        yield from crossed(RouterCase, T=tokens_of, dtype=request.dtypes, **fields)
    for data in ("negative", "far_negative", "peaked", "ties"):
        for fields in _models(request):
            yield RouterCase(T=17, dtype=request.dtypes[-1], data=data, **fields)
    axes = {
        "experts": (*at.RELEASED_EXPERTS, *at.ODD_EXPERTS),
        "scoring": ("softmax", "sigmoid"),
        "renorm": (True, False),
        "bias": BIASES,
        "groups": GROUPS,
        "scale": (1.0, 2.5, 0.125),
        "dtype": request.dtypes,
        "data": ("normal", "negative", "peaked", "ties"),
    }
    tokens = request.shuffled(at.TOKENS[1:])
    for round_ in range(request.pick(1, 4)):
        for row in pairwise(axes, request.seed + round_, allowed):
            experts, top_k = row.pop("experts")
            yield RouterCase(T=next(tokens), E=experts, k=top_k, **row)
    for tokens in at.TOKENS:
        yield RouterCase(T=tokens, dtype=request.dtypes[tokens % len(request.dtypes)], renorm=bool(tokens % 2))
    yield from crossed(RouterCase, T=(*at.TOKENS_MANY, 4095, 4097, *request.pick((), (65537,))), E=16, k=2)
    yield from _turning(request)


def _turning(request: Request) -> Iterator[Case]:
    """Every way to route at every small T and at sizes where published kernels turned wrong."""
    ways, dtypes = [*_models(request), *MORE_WAYS], cycle(request.dtypes)
    for fields in ways:
        for tokens in range(1, 18):  # what decodes runs at these
            yield RouterCase(T=tokens, dtype=next(dtypes), **fields)
    turning = cycle(at.TOKENS_TURNING)
    for fields in ways:
        for _ in range(request.pick(3, 6)):
            yield RouterCase(T=next(turning), dtype=next(dtypes), **fields)
        next(turning)  # so that six ways meet all sizes
    for scoring in ("softmax", "sigmoid"):
        for tokens in (1409, 4097, at.TOKENS_BEYOND_16_BITS):
            yield RouterCase(T=tokens, E=8, k=2, scoring=scoring, dtype=next(dtypes))
            yield RouterCase(T=tokens, E=12, k=3, scoring=scoring, bias="small", renorm=False, dtype=next(dtypes))
    for experts, top_k in at.LARGE_K:
        for scoring, bias in (("softmax", "none"), ("sigmoid", "small"), ("sigmoid", "none")):
            for tokens in (3, 33):
                yield RouterCase(T=tokens, E=experts, k=top_k, scoring=scoring, bias=bias, dtype=next(dtypes))
    for experts in at.EXPERTS_MANY:
        for scoring, data in (("softmax", "last"), ("sigmoid", "last"), ("softmax", "normal")):
            for tokens in (2, 40):
                yield RouterCase(T=tokens, E=experts, data=data, scoring=scoring, dtype=next(dtypes))
    for bias in ("small", "negative", "offset"):  # without groups, and E no power of two
        for experts in (7, 60, 128, 160):
            scorings, renorm = ("softmax", "sigmoid"), experts != 60
            yield from crossed(RouterCase, T=17, E=experts, k=4, scoring=scorings, bias=bias, renorm=renorm)
    for experts, top_k, tokens in ((8, 2, 5), (60, 4, 33), (128, 8, 65), (64, 6, 130), (256, 8, 1409)):
        for scoring in ("softmax", "sigmoid"):
            yield RouterCase(T=tokens, E=experts, k=top_k, scoring=scoring, dtype=next(dtypes), variant="poisoned")
    for experts, top_k in ((64, 64), (128, 40), (256, 65)):  # more slots than a mask of 32 or 64 bits
        yield RouterCase(T=5, E=experts, k=top_k, dtype=next(dtypes))
        yield RouterCase(T=9, E=experts, k=top_k, scoring="sigmoid", renorm=False, dtype=next(dtypes))
    for groups, bias in (("16x4", "small"), ("32x5", "small"), ("8x1", "small"), ("4x4", "low"), ("8x4", "low")):
        for tokens, experts, top_k in ((21, 64, 2), (40, 256, 8)):
            way: dict[str, Any] = {"scoring": "sigmoid", "bias": bias, "groups": groups}
            yield RouterCase(T=tokens, E=experts, k=top_k, dtype=next(dtypes), **way)
    for tokens in (3, 33):
        yield RouterCase(T=tokens, E=64, k=4, scoring="sigmoid", bias="low", dtype=next(dtypes))


def _special(request: Request) -> Iterator[Case]:
    for data in SPECIALS:
        for scoring in ("softmax", "sigmoid"):
            yield from crossed(RouterCase, T=12, E=60, k=4, data=data, scoring=scoring, dtype=request.dtypes)
            yield RouterCase(T=9, E=64, k=8, data=data, scoring=scoring, bias="small", groups="8x4")
            yield RouterCase(T=9, E=6, k=6, data=data, scoring=scoring, renorm=False)
    for data in SPECIALS:
        for scoring in ("softmax", "sigmoid"):
            for tokens, experts, top_k in ((5, 32, 3), (33, 128, 8), (17, 16, 2)):
                yield RouterCase(T=tokens, E=experts, k=top_k, data=data, scoring=scoring, dtype=request.dtypes[0])


def _layouts(request: Request) -> Iterator[Case]:
    for kind in at.LAYOUTS:
        for dtype in request.dtypes:
            shape: dict[str, Any] = {"T": 1, "E": 1, "k": 1} if kind == "unit" else {"T": 13, "E": 37, "k": 5}
            yield RouterCase(layout=f"router_logits:{kind}", dtype=dtype, **shape)
        yield RouterCase(
            T=6, E=32, k=4, layout=f"correction_bias:{kind}", bias="small", scoring="sigmoid", groups="4x2"
        )

    for kind in at.LAYOUTS[:5]:  # T == E: transposed, the table fits as it is
        yield from crossed(RouterCase, T=32, E=32, k=4, layout=f"router_logits:{kind}", dtype=request.dtypes)
    for kind in at.LAYOUTS_OF_ONE:  # one expert, one row
        yield RouterCase(T=19, E=1, k=1, layout=f"router_logits:{kind}", dtype=request.dtypes[-1])
        yield RouterCase(T=1, E=24, k=3, layout=f"router_logits:{kind}", dtype=request.dtypes[-1])
        fields: dict[str, Any] = {"scoring": "sigmoid", "layout": f"correction_bias:{kind}"}
        yield from crossed(RouterCase, T=19, E=24, k=3, bias=("small", "negative"), **fields)
    yield from crossed(RouterCase, T=7, E=60, k=4, layout=layouts(("router_logits",), at.LAYOUTS[:5]))


def _memory(request: Request) -> Iterator[Case]:
    for dtype in request.dtypes:
        yield RouterCase(T=21, E=60, k=4, dtype=dtype)
        yield RouterCase(T=21, E=64, k=6, dtype=dtype, scoring="sigmoid", bias="small", groups="8x4", scale=2.5)


def _ties() -> Iterator[Case]:
    for tokens, experts, top_k in ((21, 60, 4), (9, 16, 2), (40, 128, 8)):
        yield RouterCase(T=tokens, E=experts, k=top_k, data="ties")


def _laws(request: Request) -> Iterator[Case]:
    for law in LAWS:
        for dtype in request.pick(request.dtypes[:1] + request.dtypes[-1:], request.dtypes):
            yield RouterCase(T=18, E=60, k=4, dtype=dtype, variant=law)
            if law != "softmax_shift":
                fields: dict[str, Any] = {"scoring": "sigmoid", "bias": "small", "scale": 2.5, "renorm": False}
                yield RouterCase(T=40, E=64, k=8, dtype=dtype, variant=law, **fields)
            yield RouterCase(T=18, E=128, k=8, dtype=dtype, variant=law, renorm=False)


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    small = crossed(RouterCase, T=(1, 8, 64), dtype=request.dtypes)
    grouped = RouterCase(T=9, E=64, scoring="sigmoid", bias="small", groups="8x4", scale=2.5)
    return on_cuda([*small, grouped], [RouterCase(T=5_000_000, E=512, k=2, dtype="bf16")])
