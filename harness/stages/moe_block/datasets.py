"""Small cases of every kind that the stage `moe_block` has, on which its faults are told apart."""

from collections.abc import Iterator
from typing import Any


def probes() -> Iterator[dict[str, Any]]:
    """Fields of the cases that are not at their default."""
    for family in ("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v2", "deepseek_v3"):
        for renorm in ("default", "yes", "no"):
            yield {"family": family, "T": 9, "H": 40, "I": 24, "renorm": renorm}
        yield {"family": family, "T": 7, "H": 33, "I": 17, "shared": 9, "E": 32, "k": 5}
        yield {"family": family, "T": 5, "k": 2}
        yield {"family": family, "T": 5, "k": 1}
        yield {"family": family, "T": 9, "data": "token_nan"}
        yield {"family": family, "T": 9, "layout": "hidden_states:padded"}
    yield {"family": "deepseek_v3", "T": 257, "E": 64, "k": 8}  # near choices, which a rounded bias decides otherwise
