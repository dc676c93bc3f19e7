"""Data sets on which suspects are told apart: near relatives of the failing case, probes, and sequences of calls.

The probes of a stage cover every condition under which a fault of the catalogue shows: what one of them leaves tied
another separates.  They are small, so that all of them cost about a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from moe_harness.harness.core.case import Case

NORMAL: dict[str, Any] = {"data": "normal", "layout": "", "variant": "", "optional": False}


@dataclass(frozen=True)
class Scene:
    """Calls made one after the other; a single one except where state is asked for."""

    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        first = f"{self.cases[0].stage} {self.cases[0].id() or 'of the default shape'}"
        return first if len(self.cases) == 1 else f"{len(self.cases)} calls in a row, the first {first}"


def relatives(case: Case) -> Iterator[Scene]:
    """The same condition on other data: other seeds, and normal values in the place of special ones."""
    yield Scene((case.but(seed=case.seed + 501, variant="", optional=False),))
    yield Scene((case.but(**NORMAL | {"layout": case.layout}, seed=case.seed + 502),))
    yield Scene((case.but(seed=case.seed + 503, variant="", optional=False),))


def probes(case: Case) -> Iterator[Scene]:
    """Small cases of every kind the stage has, in the dtype of `case` where nothing else is asked for."""
    kind = type(case)
    for number, changes in enumerate(PROBES[case.stage]()):
        fields_: dict[str, Any] = {"dtype": case.dtype, "seed": case.seed + 600 + number} | changes
        yield Scene((kind(**fields_),))


def sequences(case: Case, count: int = 3) -> Iterator[Scene]:
    """Calls of one shape that was never seen, with a larger one in between; the shape follows the seed."""
    known = {f.name for f in fields(case)}
    for number in range(count):
        turn = case.seed * count + number
        rows, wide, inner = 9 + turn % 31, 24 + 8 * (turn // 13 % 29), 16 + 8 * (turn % 13)
        shape: dict[str, Any] = {
            "T": rows,
            "S": rows,
            "H": wide,
            "K": wide,
            "I": inner,
            "N": inner,
            "D": inner,
            "lead": str(rows),
        }
        if case.stage == "router":
            shape["T"] = 9 + turn % 301
        base = type(case)(
            dtype=case.dtype, seed=case.seed + 701 + 10 * number, **{k: v for k, v in shape.items() if k in known}
        )
        more = {name: 2 * shape[name] + 1 for name in ("T", "S") if name in known}
        masked: dict[str, Any] = {"masked": "some"} if "masked" in known else {}
        yield Scene(
            (
                base,
                base.but(seed=base.seed + 1),
                base.but(seed=base.seed + 2, **masked),
                base.but(seed=base.seed + 3, **more),
                base,
            )
        )


def _experts() -> Iterator[dict[str, Any]]:
    base: dict[str, Any] = {"T": 21, "H": 72, "I": 40, "E": 6, "k": 3}
    yield base
    yield base | {"activation": "gelu_tanh"}
    for change in ({"k": 1}, {"T": 1}, {"T": 1, "activation": "gelu_tanh"}, {"T": 3}, {"T": 5}, {"T": 8}, {"T": 65}):
        yield base | change
    for change in ({"H": 40}, {"H": 48}, {"H": 64}, {"H": 32}, {"H": 33}, {"H": 16}, {"I": 23}, {"I": 64}, {"I": 96}):
        yield base | change
    for change in ({"I": 25}, {"I": 48}, {"H": 24, "I": 24}, {"H": 32, "I": 16}, {"H": 48, "I": 48, "T": 64}):
        yield base | change
    others: tuple[dict[str, Any], ...] = (
        {"routing": "duplicates"},
        {"T": 40, "routing": "one", "k": 1},
        {"T": 70, "routing": "skewed"},
        {"T": 64, "E": 4, "k": 3},
        {"E": 8, "T": 9},
        {"E": 7, "k": 2, "T": 4},
        {"E": 12, "k": 10},
        {"E": 1, "k": 1},
        {"E": 3, "k": 2, "T": 2},
    )
    for change in others:
        yield base | change
    for masked in ("some", "rows", "one"):
        for kind in ("none", "alternate", "block"):
            yield base | {"masked": masked, "map": kind, "E": 7}
    yield base | {"map": "block"}
    yield base | {"map": "alternate", "E": 9, "k": 4}
    yield base | {"masked": "all", "T": 4}
    yield base | {"masked": "some", "T": 70}
    for data in (
        "token_nan",
        "token_inf",
        "expert_nan",
        "expert_inf",
        "down_inf",
        "unused_expert_nan",
        "huge",
        "tiny",
        "signed_weights",
        "cancelling",
        "exact",
    ):
        yield base | {"data": data}
    for layout in (
        "hidden_states:padded",
        "hidden_states:transposed",
        "gate_up_proj:padded",
        "down_proj:padded",
        "gate_up_proj:transposed",
        "topk_ids:padded",
        "topk_weights:padded",
        "topk_ids:strided",
    ):
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


def _grouped_linear() -> Iterator[dict[str, Any]]:
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


def _router() -> Iterator[dict[str, Any]]:
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


def _shared_expert_gate() -> Iterator[dict[str, Any]]:
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


def _moe_block() -> Iterator[dict[str, Any]]:
    for family in ("qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "deepseek_v2", "deepseek_v3"):
        for renorm in ("default", "yes", "no"):
            yield {"family": family, "T": 9, "H": 40, "I": 24, "renorm": renorm}
        yield {"family": family, "T": 7, "H": 33, "I": 17, "shared": 9, "E": 32, "k": 5}
        yield {"family": family, "T": 5, "k": 2}
        yield {"family": family, "T": 5, "k": 1}
        yield {"family": family, "T": 9, "data": "token_nan"}
        yield {"family": family, "T": 9, "layout": "hidden_states:padded"}
    yield {"family": "deepseek_v3", "T": 257, "E": 64, "k": 8}  # near choices, which a rounded bias decides otherwise


PROBES = {
    "experts": _experts,
    "grouped_linear": _grouped_linear,
    "router": _router,
    "shared_expert_gate": _shared_expert_gate,
    "moe_block": _moe_block,
}
