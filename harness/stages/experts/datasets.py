"""Small cases of every kind that the stage `experts` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any

DATA = (
    "token_nan", "token_inf", "expert_nan", "expert_inf", "down_inf", "unused_expert_nan", "huge", "tiny",
    "signed_weights", "cancelling", "exact",
)  # fmt: skip
LAYOUTS = (
    "hidden_states:padded", "hidden_states:transposed", "gate_up_proj:padded", "down_proj:padded",
    "gate_up_proj:transposed", "topk_ids:padded", "topk_weights:padded", "topk_ids:strided",
)  # fmt: skip


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    base: dict[str, Any] = {"T": 21, "H": 72, "I": 40, "E": 6, "k": 3}
    yield base
    yield base | {"activation": "gelu_tanh"}
    for change in ({"k": 1}, {"T": 1}, {"T": 1, "activation": "gelu_tanh"}, {"T": 3}, {"T": 5}, {"T": 8}, {"T": 65}):
        yield base | change
    for change in ({"H": 40}, {"H": 48}, {"H": 64}, {"H": 32}, {"H": 33}, {"H": 16}, {"I": 23}, {"I": 64}, {"I": 96}):
        yield base | change
    for change in ({"I": 25}, {"I": 48}, {"H": 24, "I": 24}, {"H": 32, "I": 16}, {"H": 48, "I": 48, "T": 64}):
        yield base | change
    yield base | {"routing": "duplicates"}
    yield base | {"T": 40, "routing": "one", "k": 1}
    yield base | {"T": 70, "routing": "skewed"}
    for change in ({"T": 64, "E": 4, "k": 3}, {"E": 8, "T": 9}, {"E": 7, "k": 2, "T": 4}, {"E": 12, "k": 10}):
        yield base | change
    for change in ({"E": 1, "k": 1}, {"E": 3, "k": 2, "T": 2}):
        yield base | change
    for masked in ("some", "rows", "one"):
        for kind in ("none", "alternate", "block"):
            yield base | {"masked": masked, "map": kind, "E": 7}
    yield base | {"map": "block"}
    yield base | {"map": "alternate", "E": 9, "k": 4}
    yield base | {"masked": "all", "T": 4}
    yield base | {"masked": "some", "T": 70}
    for data in DATA:
        yield base | {"data": data}
    for layout in LAYOUTS:
        yield base | {"layout": layout, "H": 40}
    yield base | {"layout": "hidden_states:padded", "masked": "some", "H": 48}
    for dtype in ("fp32", "fp16", "bf16"):
        yield base | {"dtype": dtype, "H": 512, "k": 4}
        yield base | {"dtype": dtype, "H": 33}
        yield base | {"dtype": dtype, "data": "huge", "weights": "model"}
    yield base | {"ints": "int32"}
    yield {"T": 9, "H": 32, "I": 8, "E": 128, "k": 8}
    yield {"T": 9, "H": 32, "I": 8, "E": 128, "k": 7}
    yield {"T": 9, "H": 32, "I": 8, "E": 256, "k": 2}
    yield {"T": 9, "H": 32, "I": 8, "E": 300, "k": 4, "routing": "last"}
    yield {"T": 2, "H": 16, "I": 4104, "E": 2, "k": 1}
    yield {"T": 4097, "H": 16, "I": 8, "E": 9, "k": 8}
    yield {"T": 33000, "H": 8, "I": 8, "E": 2, "k": 1, "routing": "one"}
