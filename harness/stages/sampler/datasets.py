"""Small cases of every kind that the stage `sampler` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default: many draws, and rows of which each has logits of its own."""
    draws = {"data": "draws", "B": 2048, "V": 17, "dtype": "fp32"}
    yield draws
    for cut in ("k", "p", "both", "rows"):
        yield draws | {"cut": cut}
    yield draws | {"vary": "positions"}
    yield draws | {"vary": "grid", "B": 4096}
    yield draws | {"vary": "grid", "temperature": -1.0, "cut": "rows", "B": 4096}
    yield draws | {"cut": "p", "temperature": 2.5}
    yield draws | {"cut": "both", "temperature": 1.0}
    yield draws | {"temperature": 0.3}
    yield draws | {"V": 300, "temperature": 1.0, "B": 4096}
    yield draws | {"V": 16}
    rows = {"B": 60, "V": 33, "dtype": "fp32"}
    for temperature in (0.0, -1.0, 0.8):
        for cut in ("none", "both", "k", "p"):
            yield rows | {"temperature": temperature, "cut": cut}
    for data in ("masked", "far_down", "edge_values", "peaked", "large"):
        yield rows | {"temperature": 0.0, "data": data}
        yield rows | {"data": data, "cut": "both"}
    for cut in ("k", "p"):  # one row alone: what serves the whole batch is its own
        yield {"B": 1, "V": 300, "dtype": "fp32", "cut": cut, "data": "hot"}
    for data in ("masked_hot", "hot", "cold"):
        yield rows | {"data": data}
    yield rows | {"temperature": 0.0, "layout": "logits:padded"}
    yield rows | {"temperature": 0.0, "V": 300}
    yield rows | {"temperature": 0.0, "V": 2049, "B": 9}
