"""Small cases of every kind that the stage `rms_norm` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    base = {"lead": "13", "H": 72}
    for residual in (False, True):
        with_ = base | {"residual": residual}
        yield with_
        for change in (
            {"H": 33},
            {"H": 48},
            {"H": 16},
            {"H": 7},
            {"H": 2048},
            {"H": 5120},
            {"lead": "1"},
            {"lead": "2x3"},
            {"lead": "5x1x4"},
            {"lead": "129", "H": 16},
            {"eps": 1e-3},
            {"eps": 1e-5},
        ):
            yield with_ | change
        for data in ("tiny", "offset", "spike", "huge", "zero_row", "row_nan", "cancelling"):
            yield with_ | {"data": data}
            yield with_ | {"data": data, "eps": 1e-3}
        for layout in ("x:padded", "weight:strided", "residual:padded", "x:transposed"):
            yield with_ | {"layout": layout, "H": 33} if residual or "residual" not in layout else with_
        for dtype in ("fp32", "fp16", "bf16"):
            yield with_ | {"dtype": dtype, "H": 2048, "lead": "65"}
