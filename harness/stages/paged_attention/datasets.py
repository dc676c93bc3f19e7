"""Small cases of every kind that the stage `paged_attention` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    base = {"S": 4, "length": 45}
    yield base
    for queries in ("prompt", "mixed", "few", "chunk"):
        yield base | {"queries": queries}
    for change in (
        {"page": 16},
        {"page": 1},
        {"page": 32, "length": 70},
        {"Hq": 6, "Hk": 3, "D": 20},
        {"Hq": 5, "Hk": 1},
        {"S": 1, "length": 19},
        {"S": 1, "length": 9},
        {"scale": 0.125},
        {"scale": 1.0},
        {"order": "head"},
        {"empties": True, "queries": "mixed", "S": 7},
        {"shared": True},
        {"past": "wild"},
        {"stale": "large"},
    ):
        yield base | change
    for data in ("far_scores", "negative_scores", "one_peak", "offset_values", "huge_values", "q_nan", "key_nan"):
        yield base | {"data": data}
        yield base | {"data": data, "queries": "few"}
    for layout in ("q:padded", "block_table:padded", "value_cache:outer_padded", "key_cache:outer_padded"):
        yield base | {"layout": layout}
    for length in (130, 300, 600, 1100):
        yield {"S": 2, "length": length, "page": 16, "D": 32}
    yield {"S": 2, "length": 100, "page": 16, "D": 32, "queries": "prompt"}
    for dtype in ("fp32", "fp16", "bf16"):
        yield {"S": 3, "length": 70, "queries": "chunk", "Hq": 8, "Hk": 2, "D": 128, "page": 16, "dtype": dtype}
