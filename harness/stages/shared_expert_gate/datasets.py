"""Small cases of every kind that the stage `shared_expert_gate` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    base = {"lead": "7", "H": 40, "D": 56}
    yield base
    for change in (
        {"lead": "1"},
        {"lead": "6"},
        {"lead": "2x3"},
        {"lead": "1x5"},
        {"H": 48},
        {"H": 64, "D": 32},
        {"D": 40},
        {"D": 24},
        {"D": 33},
        {"H": 32, "D": 32},
        {"H": 512},
    ):
        yield base | change
    for data in (
        "row_nan",
        "row_inf",
        "output_nan",
        "tiny",
        "huge",
        "cancelling",
        "saturated",
        "saturated_off",
        "exact",
    ):
        yield base | {"data": data}
    for layout in (
        "hidden_states:padded",
        "shared_output:padded",
        "gate_weight:strided",
        "gate_weight:padded",
        "hidden_states:transposed",
        "shared_output:transposed",
    ):
        yield base | {"layout": layout}
    for dtype in ("fp32", "fp16", "bf16"):
        yield base | {"dtype": dtype, "H": 1024}
    yield {"lead": "32800", "H": 4, "D": 4}
