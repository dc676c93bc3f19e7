"""Cases of the stage `paged_attention`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Self

from moe_harness.harness.core import boundaries as at
from moe_harness.harness.core.case import Case, crossed, layouts
from moe_harness.harness.core.plan import Request, on_cuda, pairwise

HEADS = ((8, 2), (4, 4), (6, 2), (5, 1), (1, 1), (16, 1), (32, 4))  # query heads, key/value heads
WIDTHS = (8, 16, 20, 64, 80, 96, 128)
PAGES = (1, 2, 3, 16, 32, 64)
QUERIES = ("decode", "chunk", "prompt", "mixed", "few")
SPECIALS = (
    "q_nan",
    "key_nan",
    "far_scores",
    "negative_scores",
    "same_keys",
    "one_peak",
    "offset_values",
    "huge_values",
)
LAWS = ("sequence_permutation", "row_alone", "page_permutation", "other_page_size", "chunk_in_two", "values_times_four",
        "heads_permuted", "table_behind_the_end")  # fmt: skip
OPERANDS = ("q", "key_cache", "value_cache", "block_table", "query_start", "context_len")


@dataclass(frozen=True, kw_only=True)
class PagedAttentionCase(Case):
    stage: ClassVar[str] = "paged_attention"
    S: int = 5
    length: int = 40  # of the longest sequence
    queries: str = "decode"  # of each sequence: one; a chunk; the whole prompt; in turn; two or three
    Hq: int = 4
    Hk: int = 2
    D: int = 16
    page: int = 4
    empties: bool = False  # every third sequence has no query, every fifth no key
    order: str = "token"  # "head": inside a page the caches lie head by head
    shared: bool = False  # sequences begin with the same pages
    past: str = "pages"  # table entries behind the end: those of "pages" of others, or "wild" numbers
    stale: str = "nan"  # slots that hold no key of the sequence: NaN, or "large" numbers
    ids: str = "int32"  # dtype of table, starts and lengths
    scale: float = 0.0  # 0: 1 / sqrt(D)

    def rows(self) -> int:
        return sum(count for count, _ in self.sequences())

    def part(self) -> str:
        """A kernel for decoding alone is whole in itself."""
        alone = self.queries == "decode" and not self.empties
        return f"{'one query a sequence' if alone else 'any queries'}, {self.dtype}"

    def steps(self) -> int:
        return self.Hk * sum((1 + count // 4) * (1 + length // 16) for count, length in self.sequences())

    def resized(self) -> Self:
        return self.but(S=self.S + 2, length=self.length // 2 + 3, seed=self.seed + 1)

    def sequences(self) -> list[tuple[int, int]]:
        """(queries, keys) of each sequence: the longest, one key, page edges and one off them, and any.

        They follow from the shape alone, so that other data of the same shape fit into the same operands.
        """
        random, edge = Random(self.S * 1009 + self.length), self.length // self.page * self.page
        found = []
        for s in range(self.S):
            any_length = random.randint(1, self.length)
            lengths = (self.length, edge, 1, edge - 1, edge + 1, any_length)
            length = min(max(1, lengths[s % 6]), self.length)
            chunk = random.randint(1, length)
            kind = ("decode", "chunk", "prompt")[s % 3] if self.queries == "mixed" else self.queries
            count = {"decode": 1, "chunk": chunk, "prompt": length, "few": min(length, 2 + s % 2)}[kind]
            if self.empties and s % 3 == 1:
                count = 0
            if self.empties and s % 5 == 2:
                count, length = min(count, 1), 0
            found.append((count, length))
        return found


CaseType = PagedAttentionCase


def plan(request: Request) -> dict[str, Iterable[Case]]:
    """Cases of every check, in the order in which they are judged."""
    return {
        "contract": _contract(request),
        "exact": _exact(request),
        "numeric": _numeric(request),
        "layouts": _layouts(request),
        "memory": _memory(request),
        "special": _special(request),
        "laws": _laws(request),
        "determinism": _memory(request),
        "batch_invariance": _memory(request),
        "leak": [PagedAttentionCase(S=64, length=20, Hq=16, Hk=2, D=64, dtype=request.dtypes[0])],
        **_cuda_cases(request),
    }


def _contract(request: Request) -> Iterator[PagedAttentionCase]:
    for dtype in request.dtypes:
        yield PagedAttentionCase(dtype=dtype)
        yield PagedAttentionCase(S=0, dtype=dtype)
        yield PagedAttentionCase(empties=True, S=6, queries="mixed", dtype=dtype)
        yield PagedAttentionCase(queries="prompt", length=9, dtype=dtype)


def _exact(request: Request) -> Iterator[PagedAttentionCase]:
    """Every query picks one key."""
    axes = {
        "S": (1, 2, 7), "length": (1, 5, 17, 33, 64, 130), "queries": QUERIES, "heads": HEADS, "D": (16, 20, 64, 128),
        "page": PAGES, "empties": (False, True), "order": ("token", "head"), "shared": (False, True),
        "past": ("pages", "wild"), "ids": ("int32", "int64"), "dtype": request.dtypes,
    }  # fmt: skip
    for round_ in range(request.pick(1, 3)):
        for row in pairwise(axes, request.seed + round_):
            query_heads, heads = row.pop("heads")
            yield PagedAttentionCase(Hq=query_heads, Hk=heads, data="exact", scale=1.0, **row)
    for length in at.TOKENS[1:]:
        dtype = request.dtypes[length % len(request.dtypes)]
        yield PagedAttentionCase(S=2, length=length, page=16, data="exact", scale=1.0, dtype=dtype)
    for sequences in (17, 33, 65, 129, 257):
        yield PagedAttentionCase(S=sequences, length=19, data="exact", scale=1.0, dtype=request.dtypes[-1])


def _numeric(request: Request) -> Iterator[PagedAttentionCase]:
    for dtype in request.dtypes:
        model: dict[str, Any] = {"Hq": 32, "Hk": 4, "D": 128, "page": 16, "S": 3, "length": 70}
        yield from crossed(PagedAttentionCase, queries=QUERIES, dtype=dtype, **model)
        yield PagedAttentionCase(Hq=8, Hk=1, D=128, page=32, S=2, length=request.pick(1100, 4100), dtype=dtype)
    axes = {
        "S": (1, 2, 4, 7), "length": (1, 2, 15, 16, 17, 33, 65, 130), "queries": QUERIES, "heads": HEADS, "D": WIDTHS,
        "page": PAGES, "empties": (False, True), "order": ("token", "head"), "shared": (False, True),
        "past": ("pages", "wild"), "stale": ("nan", "large"), "ids": ("int32", "int64"), "scale": (0.0, 0.125, 1.0),
        "dtype": request.dtypes,
    }  # fmt: skip
    for round_ in range(request.pick(1, 3)):
        for row in pairwise(axes, request.seed + 1 + round_):
            query_heads, heads = row.pop("heads")
            yield PagedAttentionCase(Hq=query_heads, Hk=heads, **row)
    for sequences, length, heads, page in ((1, 600, 2, 16), (3, 777, 1, 8)):  # more blocks than a loop may expect
        for dtype in (request.dtypes[0], request.dtypes[-1]):
            yield PagedAttentionCase(S=sequences, length=length, Hq=4 * heads, Hk=heads, D=64, page=page, dtype=dtype)
    yield from _beyond(request)


def _beyond(request: Request) -> Iterator[PagedAttentionCase]:
    """Sizes beyond what one block of a kernel holds: heads, groups of heads, pages, queries, keys, and page numbers."""
    shapes: tuple[dict[str, Any], ...] = (
        {"D": 192}, {"D": 256}, {"D": 256, "queries": "mixed"}, {"D": 576, "Hk": 1},
        {"Hq": 20, "Hk": 1}, {"Hq": 32, "Hk": 1, "queries": "few"}, {"Hq": 66, "Hk": 2, "D": 20},
        {"page": 128, "length": 300}, {"page": 256, "length": 700}, {"page": 96, "length": 300, "order": "head"},
        {"queries": "prompt", "S": 1, "length": 530, "Hq": 2, "Hk": 1, "page": 16},
        {"queries": "chunk", "S": 2, "length": 700, "Hq": 2, "Hk": 1, "page": 16, "D": 8},
        {"S": 1, "length": 9_000, "Hk": 1, "page": 16, "D": 8},
        {"S": 1, "length": 35_000, "Hq": 1, "Hk": 1, "page": 1, "D": 8},
        {"queries": "prompt", "S": 1, "length": 2_100, "Hq": 1, "Hk": 1, "page": 16, "D": 8},
    )  # fmt: skip
    for place, shape in enumerate(shapes):
        yield PagedAttentionCase(dtype=request.dtypes[place % len(request.dtypes)], **{"S": 2, **shape})


def _layouts(request: Request) -> Iterator[PagedAttentionCase]:
    for operand in OPERANDS:
        for kind in at.LAYOUTS:
            if kind == "expanded" and operand not in ("q", "key_cache", "value_cache"):
                continue  # starts and lengths that are all one
            for queries in ("decode", "mixed"):
                shape: dict[str, Any] = {"S": 1, "Hq": 1, "Hk": 1, "page": 1} if kind == "unit" else {}
                stale = "large" if kind == "expanded" else "nan"
                for dtype in request.dtypes if queries == "decode" else request.dtypes[-1:]:
                    yield PagedAttentionCase(
                        layout=f"{operand}:{kind}", queries=queries, stale=stale, dtype=dtype, **shape
                    )
    for operand in OPERANDS:
        for kind in at.LAYOUTS[:5]:
            for sequences, heads, width in ((2, 4, 32), (7, 3, 20)):
                shape = {"S": sequences, "length": 21, "Hq": 2 * heads, "Hk": heads, "D": width, "page": 8}
                yield PagedAttentionCase(layout=f"{operand}:{kind}", dtype=request.dtypes[0], **shape)
    by_tokens = layouts(("q", "key_cache", "value_cache"), ("permuted",))  # heads
    yield from crossed(PagedAttentionCase, layout=by_tokens, queries=("decode", "mixed"), dtype=request.dtypes[0])


def _memory(request: Request) -> list[PagedAttentionCase]:
    return [
        PagedAttentionCase(S=4, length=37, queries=queries, order=order, dtype=dtype)
        for dtype in request.dtypes for queries, order in (("decode", "token"), ("mixed", "head"))
    ]  # fmt: skip


def _special(request: Request) -> Iterator[PagedAttentionCase]:
    for data in SPECIALS:
        for dtype in request.dtypes:
            yield from crossed(PagedAttentionCase, data=data, queries=("decode", "few"), dtype=dtype)
            yield PagedAttentionCase(data=data, S=2, length=130, page=16, dtype=dtype)
    shape: dict[str, Any] = {"S": 3, "length": 70, "page": 8, "Hq": 6, "Hk": 3, "D": 32}
    yield from crossed(PagedAttentionCase, data=SPECIALS, dtype=request.dtypes[0], **shape)


def _laws(request: Request) -> Iterator[PagedAttentionCase]:
    for law in LAWS:
        queries = "mixed" if law == "chunk_in_two" else ("decode", "mixed")
        yield from crossed(PagedAttentionCase, S=4, length=45, variant=law, dtype=request.dtypes, queries=queries)


def _cuda_cases(request: Request) -> dict[str, Iterable[Case]]:
    model: dict[str, Any] = {"page": 32, "Hk": 4, "D": 128}
    small = crossed(PagedAttentionCase, S=(1, 9), dtype=request.dtypes, length=700, Hq=32, order="head", **model)
    large = PagedAttentionCase(S=3, length=200, data="large", scale=1.0, dtype=request.dtypes[-1], **model)
    return on_cuda(small, [large])
