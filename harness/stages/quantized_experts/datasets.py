"""Small cases of every kind that the stage `quantized_experts` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any

from moe_harness.harness.stages.quantized_experts.cases import FORMATS, SPECIALS


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    base: dict[str, Any] = {"T": 21, "E": 5, "k": 2}
    for format in FORMATS:
        own = base | {"format": format}
        yield own
        yield own | {"bias": True}
        yield own | {"activation": "swiglu_oai", "bias": True}
        yield own | {"H": 512, "I": 384}
        yield own | {"data": "exact"}
        yield own | {"dtype": "bf16"}
        for data, formats in SPECIALS.items():
            if format in formats or (not formats and format == "fp8_block"):
                yield own | {"data": data, "I": 256}
    for change in (
        {"T": 1}, {"T": 70}, {"k": 1}, {"E": 1, "k": 1}, {"H": 200, "I": 72}, {"H": 128, "I": 128},
        {"activation": "gelu_tanh"}, {"masked": "some", "map": "alternate", "bias": True}, {"map": "block", "E": 8},
        {"routing": "duplicates"}, {"weights": "model"}, {"T": 64, "E": 2, "k": 1},
        {"layout": "gate_up_scale:padded"}, {"layout": "down_scale:transposed"}, {"layout": "gate_up_proj:padded"},
    ):  # fmt: skip
        yield base | change
