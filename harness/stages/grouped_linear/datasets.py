"""Small cases of every kind that the stage `grouped_linear` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    base = {"S": 37, "K": 72, "N": 40, "E": 5}
    yield base
    yield base | {"bias": True}
    for sizes in ("sparse", "first", "last", "even", "ones"):
        yield base | {"sizes": sizes}
        yield base | {"sizes": sizes, "bias": True, "E": 8}
    for change in (
        {"K": 40},
        {"K": 48},
        {"K": 64},
        {"K": 16},
        {"K": 33},
        {"N": 48},
        {"N": 24},
        {"N": 33},
        {"K": 32, "N": 32},
        {"S": 1},
        {"S": 3, "E": 1},
        {"S": 15, "E": 4},
        {"S": 128, "E": 8, "sizes": "even"},
        {"S": 300, "E": 2},
        {"S": 70, "E": 20, "sizes": "even"},
        {"E": 1},
    ):
        yield base | change
    yield base | {"K": 40, "bias": True}
    for data in (
        "row_nan",
        "row_inf",
        "expert_nan",
        "expert_inf",
        "unused_expert_nan",
        "huge",
        "tiny",
        "cancelling",
        "exact",
    ):
        yield base | {"data": data}
    for layout in (
        "x:padded",
        "x:transposed",
        "weight:padded",
        "weight:transposed",
        "bias:padded",
        "group_sizes:strided",
    ):
        yield base | {"layout": layout, "K": 40, "N": 40, "bias": True}
    for dtype in ("fp32", "fp16", "bf16"):
        yield base | {"dtype": dtype, "K": 512}
    yield base | {"ints": "int32"}
    yield {"S": 300, "K": 8, "N": 8, "E": 260, "sizes": "even"}
    yield {"S": 33000, "K": 4, "N": 4, "E": 3}
