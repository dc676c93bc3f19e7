"""Cases of the stage `sampler`.

Rows of the kind `draws` are many draws from few distributions, so that counts can be judged; in the others every row
has logits of its own, and a token has to be one that may be drawn.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

WIDTHS = (1, 2, 3, 7, 16, 17, 33, 64, 129, 1000, 2049)
CUTS = ("none", "k", "p", "both", "rows")  # "rows": each row in turn without a cut, with one, with both
APART = 8192  # of a vocabulary wider than that two tokens are drawn, as many columns apart as a power of two allows
MANY = 500  # draws with cuts from a vocabulary wider than that have more candidates (`stage.LIKELY`)
VARY = ("seeds", "positions", "grid")  # what tells the draws of one distribution apart
# Beside them the cut "edges", options that cut nothing or all but one token, and "far", large seeds and positions.
SPECIALS = ("masked", "masked_hot", "ties", "all_equal", "peaked", "far_down", "large", "hot", "cold", "edge_values")
LAWS = ("row_permutation", "row_alone", "batch_split", "repeated", "shifted", "logits_in_a_wider_buffer")
OPERANDS = ("logits", "temperature", "top_k", "top_p", "seeds", "positions")


@dataclass(frozen=True, kw_only=True)
class SamplerCase(Case):
    stage: ClassVar[str] = "sampler"
    B: int = 64
    V: int = 33
    temperature: float = 0.8  # -1: of each row another, 0 among them
    cut: str = "none"
    vary: str = "seeds"
    ids: str = "int64"  # dtype of top_k, seeds and positions

    def rows(self) -> int:
        return self.B

    def part(self) -> str:
        return f"{'without cuts' if self.cut == 'none' else 'with cuts'}, {self.dtype}"

    def steps(self) -> int:
        return -(-self.B // 4) * (1 + self.V // 64) * (4 if self.cut != "none" else 1)

    def resized(self) -> Self:
        return self.but(B=self.B // 2 + 3, V=self.V + 7, seed=self.seed + 1)


CaseType = SamplerCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "numeric": _draws(request),
        "exact": _greedy(request),
        "special": _special(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "laws": _laws(request),
        "determinism": _memory(request),
        "batch_invariance": _memory(request),
        "leak": [SamplerCase(B=4096, V=100, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[SamplerCase]:
    for dtype in request.dtypes:
        yield SamplerCase(dtype=dtype)
        yield SamplerCase(B=0, dtype=dtype)
        yield SamplerCase(temperature=0.0, dtype=dtype, variant="defaults")
        yield SamplerCase(B=7, V=1, cut="both", dtype=dtype)


def _draws(request: Request) -> Iterator[SamplerCase]:
    many, widths = request.pick(4096, 65536), cycle((17, 11, 24, 14))
    for number, cut in enumerate(CUTS):
        for place, vary in enumerate(VARY):
            for ids in ("int64", "int32"):
                dtype = request.dtypes[(number + place) % len(request.dtypes)]
                width = next(widths)
                yield SamplerCase(B=many, V=width, data="draws", cut=cut, vary=vary, ids=ids, dtype=dtype)
    first: dict[str, Any] = {"B": many, "data": "draws", "dtype": request.dtypes[0]}
    yield from crossed(SamplerCase, V=(2, 5, 64, 300), temperature=(0.3, 1.0, 2.5), **first)
    yield from _few_draws(request)
    yield from crossed(SamplerCase, V=(240, 400), temperature=1.0, **first)  # rare tokens
    for dtype in request.dtypes:
        width = next(widths)
        yield SamplerCase(B=many, V=width, data="draws", temperature=-1.0, cut="rows", vary="grid", dtype=dtype)
    axes = {
        "B": (1, 5, 33, 130), "V": WIDTHS, "temperature": (-1.0, 0.1, 1.0, 3.0), "cut": CUTS, "vary": VARY,
        "ids": ("int64", "int32"), "dtype": request.dtypes,
    }  # fmt: skip
    for row in pairwise(axes, request.seed):
        yield SamplerCase(**row)
    for cut, width in (("k", 40), ("p", 26), ("both", 56)):  # what is cut off weighs much
        yield SamplerCase(B=many, V=width, data="draws", temperature=2.5, cut=cut, dtype=request.dtypes[0])
    for ids, dtype in zip(("int64", "int32"), cycle(request.dtypes), strict=False):
        # As many in every profile: seeds of 32 bits that start this high end after 64.
        yield SamplerCase(B=4096, V=19, data="draws", vary="far", ids=ids, dtype=dtype)
    for dtype in (request.dtypes[0], request.dtypes[-1]):
        yield SamplerCase(B=128, V=24, data="draws", temperature=3.0, cut="edges", dtype=dtype)
    # Wider than one block of a kernel, and no block without weight.
    yield SamplerCase(B=1024, V=4100, data="draws", temperature=1.5, dtype=request.dtypes[0])
    # More candidates than a kernel keeps that sorts a few of them.
    for cut, width in (("k", 4100), ("k", 1800), ("k", 700), ("p", 700), ("both", 900), ("p", 1200)):
        yield SamplerCase(B=1024, V=width, data="draws", cut=cut, temperature=2.5, dtype=request.dtypes[0])
    for rows, width in ((256, 8200), (300, 8219), (256, 16500)):  # two tokens alone, far apart (`APART`)
        yield SamplerCase(B=rows, V=width, data="draws", temperature=1.0, dtype=request.dtypes[0])


def _few_draws(request: Request) -> Iterator[SamplerCase]:
    """As many draws as tell a token that is not drawn at random, and few enough to be interpreted: Triton's interpreter
    leaves out what has thousands, and a kernel that always takes the likeliest token passed there."""
    dtypes = cycle(request.dtypes)
    for vary in VARY:
        yield SamplerCase(B=128, V=17, data="draws", temperature=0.9, vary=vary, dtype=next(dtypes))
    for cut, vary in (("k", "grid"), ("p", "positions"), ("both", "seeds")):
        yield SamplerCase(B=128, V=24, data="draws", temperature=3.0, cut=cut, vary=vary, dtype=next(dtypes))


def _greedy(request: Request) -> Iterator[SamplerCase]:
    """At temperature 0 there is one right token (of equal ones any)."""
    for width in (*WIDTHS, *request.pick((20000,), (20000, 151936))):
        for dtype in request.dtypes:
            yield SamplerCase(B=9, V=width, temperature=0.0, data="greedy", dtype=dtype, cut=CUTS[width % 4])
    for rows in at.TOKENS_FEW:
        yield SamplerCase(
            B=rows, V=50, temperature=0.0, data="greedy", dtype=request.dtypes[rows % len(request.dtypes)]
        )


def _special(request: Request) -> Iterator[SamplerCase]:
    shapes: Iterator[dict[str, Any]] = cycle(
        ({"B": 64, "V": 33}, {"B": 50, "V": 40}, {"B": 70, "V": 24}, {"B": 40, "V": 57}, {"B": 33, "V": 48})
    )
    for data in SPECIALS:
        for dtype in request.dtypes:
            for cut in CUTS:
                yield SamplerCase(data=data, cut=cut, dtype=dtype, **next(shapes))
            yield SamplerCase(data=data, temperature=0.0, dtype=dtype, **next(shapes))


def _layouts(request: Request) -> Iterator[SamplerCase]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            if kind == "expanded" and operand not in ("logits", "temperature", "seeds"):
                continue
            for dtype in request.dtypes if operand == "logits" else request.dtypes[:1]:
                rows = 1 if kind == "unit" else 40
                yield SamplerCase(B=rows, temperature=-1.0, cut="both", layout=f"{operand}:{kind}", dtype=dtype)


def _memory(request: Request) -> list[SamplerCase]:
    return list(crossed(SamplerCase, B=33, V=70, temperature=-1.0, dtype=request.dtypes, cut=("none", "both")))


def _laws(request: Request) -> Iterator[SamplerCase]:
    rows = cycle((60, 41, 24, 77))
    for law in LAWS:
        for dtype in request.dtypes:
            for cut in ("none", "both"):
                yield SamplerCase(B=next(rows), V=50, temperature=-1.0, cut=cut, vary="grid", dtype=dtype, variant=law)


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    small = crossed(SamplerCase, B=(1, 33), V=5000, temperature=-1.0, cut=("none", "both"))
    large = [SamplerCase(B=14200, V=151936, temperature=0.0, data="greedy", dtype=request.dtypes[-1])]
    return on_cuda(small, large)
