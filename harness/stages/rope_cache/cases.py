"""Cases of the stage `rope_cache`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, layouts
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

HEADS = ((32, 4), (16, 2), (8, 8), (6, 2), (5, 1), (1, 1), (64, 4), (40, 8))  # query heads, key/value heads
WIDTHS = (2, 4, 16, 20, 64, 80, 96, 128)
PAGES = (1, 2, 3, 16, 32, 64)
NORMS = ("both", "none", "q", "k")
SLOTS = ("all", "some", "none", "backwards")
POSITIONS = ("random", "row", "zero", "far")
THETAS = (1e4, 1e6, 5e6)
SPECIALS = ("k_nan", "v_inf", "tiny", "huge", "spike")
LAWS = ("row_permutation", "row_alone", "batch_split", "one_step_further", "turned_back", "value_times_four")
OPERANDS = ("q", "k", "v", "positions", "slots", "key_cache", "value_cache", "q_norm", "k_norm")


@dataclass(frozen=True, kw_only=True)
class RopeCacheCase(Case):
    stage: ClassVar[str] = "rope_cache"
    T: int = 9
    Hq: int = 4
    Hk: int = 2
    D: int = 16
    page: int = 4
    norms: str = "both"  # which of q and k are normalised
    slots: str = "some"  # "some": every third token has none; "backwards": in falling order
    positions: str = "random"  # "row": 0, 1, 2, ...; "far": up to 130,000; "farther": up to a million
    theta: float = 1e6
    eps: float = 1e-6
    order: str = "token"  # "head": inside a page the caches lie head by head
    ids: str = "int64"  # dtype of positions and slots

    def rows(self) -> int:
        return self.T

    def steps(self) -> int:
        return self.T * self.Hk

    def resized(self) -> Self:
        return self.but(T=2 * self.T + 1, seed=self.seed + 1)


CaseType = RopeCacheCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": crossed(RopeCacheCase, data=SPECIALS, dtype=request.dtypes, norms=("both", "none")),
        "laws": _laws(request),
        "determinism": _memory(request),
        "batch_invariance": _memory(request),
        "leak": [RopeCacheCase(T=257, Hq=32, Hk=4, D=64, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[RopeCacheCase]:
    for dtype in request.dtypes:
        yield RopeCacheCase(dtype=dtype)
        yield RopeCacheCase(T=0, dtype=dtype)
        yield RopeCacheCase(norms="none", variant="defaults", dtype=dtype)


def _exact(request: Request) -> Iterator[RopeCacheCase]:
    """Position 0 and no norm: everything is only moved."""
    axes = {
        "T": (1, 2, 7, 16, 33), "heads": HEADS, "D": WIDTHS, "page": PAGES, "slots": SLOTS, "order": ("token", "head"),
        "ids": ("int64", "int32"), "dtype": request.dtypes,
    }  # fmt: skip
    for row in pairwise(axes, request.seed):
        query_heads, heads = row.pop("heads")
        yield RopeCacheCase(Hq=query_heads, Hk=heads, data="exact", norms="none", positions="zero", **row)


def _numeric(request: Request) -> Iterator[RopeCacheCase]:
    yield from crossed(RopeCacheCase, Hq=32, Hk=4, D=128, page=16, T=5, dtype=request.dtypes, positions=POSITIONS)
    axes = {
        "T": (1, 3, 8, 17), "heads": HEADS, "D": WIDTHS, "page": PAGES, "norms": NORMS, "slots": SLOTS,
        "positions": POSITIONS, "theta": THETAS, "eps": (1e-6, 1e-5), "order": ("token", "head"),
        "ids": ("int64", "int32"), "dtype": request.dtypes,
    }  # fmt: skip
    for row in pairwise(axes, request.seed + 1):
        query_heads, heads = row.pop("heads")
        yield _named(RopeCacheCase(Hq=query_heads, Hk=heads, **row))
    for tokens in (*at.TOKENS_FEW, 255, 257, 1025):
        yield RopeCacheCase(T=tokens, D=8, dtype=request.dtypes[tokens % len(request.dtypes)])
    alone = {"norms": NORMS, "slots": SLOTS, "positions": POSITIONS, "D": (16, 64, 2, 128), "page": (16, 4, 1)}
    for place, row in enumerate(pairwise(alone, request.seed + 2)):  # one sequence that decodes
        yield _named(RopeCacheCase(T=1, Hq=8, dtype=request.dtypes[place % len(request.dtypes)], **row))
    for place, dtype in enumerate(request.dtypes):
        yield RopeCacheCase(T=5, Hq=2, Hk=1, D=(192, 256)[place % 2], dtype=dtype)
        yield RopeCacheCase(T=7, D=64, positions="farther", dtype=dtype)
    many: dict[str, Any] = {"T": at.TOKENS_BEYOND_16_BITS, "Hq": 1, "Hk": 1, "D": 2, "page": 16}  # and as many slots
    yield RopeCacheCase(dtype=request.dtypes[-1], norms="none", **many)


def _named(case: RopeCacheCase) -> RopeCacheCase:
    """Positions 0, 1, 2, ... of one row are position 0, and called so: conditions are read off the axes."""
    return case.but(positions="zero") if case.T == 1 and case.positions == "row" else case


def _layouts(request: Request) -> Iterator[RopeCacheCase]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            if kind == "expanded" and operand.endswith(("cache", "slots")):
                continue  # one element under two names: which of two writes stays is nobody's promise
            for dtype in request.dtypes:
                shape: dict[str, Any] = {"T": 1, "Hq": 1, "Hk": 1, "page": 1} if kind == "unit" else {}
                yield RopeCacheCase(layout=f"{operand}:{kind}", dtype=dtype, **shape)
    for operand in OPERANDS:
        for kind in at.LAYOUTS[:5]:
            for tokens, heads, width in ((5, 1, 32), (13, 3, 20)):
                shape = {"T": tokens, "Hq": 2 * heads, "Hk": heads, "D": width}
                yield RopeCacheCase(layout=f"{operand}:{kind}", dtype=request.dtypes[0], **shape)
    heads_by_tokens = layouts(("q", "k", "v", "key_cache", "value_cache"), ("permuted",))
    yield from crossed(RopeCacheCase, layout=heads_by_tokens, T=(5, 12), dtype=request.dtypes[0])


def _memory(request: Request) -> list[RopeCacheCase]:
    cases = crossed(RopeCacheCase, T=11, dtype=request.dtypes, order=("token", "head"))
    return [*cases, RopeCacheCase(T=20, Hq=6, Hk=2, D=20, page=3, norms="none", dtype=request.dtypes[-1])]


def _laws(request: Request) -> Iterator[RopeCacheCase]:
    for law in LAWS:
        for dtype in request.dtypes:
            norms = "none" if law in ("one_step_further", "turned_back") else "both"
            yield RopeCacheCase(T=12, variant=law, norms=norms, slots="all", dtype=dtype)


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    model: dict[str, Any] = {"Hq": 32, "Hk": 4, "D": 128, "page": 16}
    small = crossed(RopeCacheCase, T=(1, 8, 65), order=("token", "head"), dtype=request.dtypes, **model)
    large = [RopeCacheCase(T=64, Hq=8, Hk=4, D=128, page=1 << 16, data="large", norms="none", dtype=request.dtypes[-1])]
    return on_cuda(small, large)
