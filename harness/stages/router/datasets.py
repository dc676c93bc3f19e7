"""Small cases of every kind that the stage `router` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    plain = {"T": 33, "E": 24, "k": 3}
    grouped = plain | {"E": 64, "k": 6, "groups": "8x3", "T": 33}
    for renorm in (True, False):
        for scale in (1.0, 2.5):
            for fields_ in ({}, {"scoring": "sigmoid"}, {"scoring": "sigmoid", "bias": "small"}):
                yield plain | {"renorm": renorm, "scale": scale} | fields_
        yield grouped | {"renorm": renorm}
        yield grouped | {"renorm": renorm, "scoring": "sigmoid", "bias": "small", "scale": 2.5}
        yield grouped | {"renorm": renorm, "scoring": "sigmoid", "bias": "negative"}
        for data in ("negative", "far_negative", "peaked", "ties", "nan_row", "minus_inf", "nan_element"):
            yield plain | {"renorm": renorm, "data": data}
            yield plain | {"renorm": renorm, "data": data, "scoring": "sigmoid"}
    yield grouped | {"scoring": "sigmoid", "bias": "offset"}
    yield plain | {"scoring": "sigmoid", "bias": "offset", "E": 128}
    yield plain | {"bias": "small"}
    for change in (
        {"k": 1},
        {"k": 8},
        {"k": 10},
        {"E": 6, "renorm": False},
        {"E": 32},
        {"E": 128, "k": 8},
        {"E": 128, "k": 7},
        {"E": 320, "k": 8},
        {"T": 1},
        {"T": 3},
        {"T": 4},
        {"T": 5},
        {"T": 32},
        {"E": 3, "k": 3},
        {"layout": "router_logits:padded"},
        {"layout": "router_logits:transposed"},
    ):
        yield plain | change
    for dtype in ("fp32", "fp16", "bf16"):
        yield plain | {"dtype": dtype, "E": 256, "k": 8}
        yield plain | {"dtype": dtype, "E": 256, "k": 8, "renorm": False, "T": 257}
    yield plain | {"T": 257, "E": 512, "k": 10, "data": "ties"}
