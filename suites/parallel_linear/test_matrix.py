"""The block of each model family under each layout: one matrix, in which a cell without a result is a failure.

Every rank's output has the very bits of one rank that holds everything.  The families differ in their routing, which
is their own, in their shared experts and in zero-experts; what a family does not have is crossed out with the reason.
"""

from itertools import product
from typing import Any

import pytest

from moe_harness.suites.parallel_linear.layout_tasks import FAMILIES
from moe_harness.suites.parallel_linear.test_layouts import check

# rows: families; x: judged, -: the family has no such thing
MATRIX = """
                            TP  EP  TPxEP  DPxEP  sequence  uneven  idle  redundant  zero  shared-sharded  shared-whole
qwen2_moe                   x   x   x      x      x         x       x     x          -     x               x
qwen3_moe                   x   x   x      x      x         x       x     x          -     -               -
qwen3_next                  x   x   x      x      x         x       x     x          -     x               x
qwen3_omni_moe_talker_text  x   x   x      x      x         x       x     x          -     x               x
mixtral                     x   x   x      x      x         x       x     x          -     -               -
deepseek_v2                 x   x   x      x      x         x       x     x          -     x               x
deepseek_v3                 x   x   x      x      x         x       x     x          -     x               x
longcat_flash               x   x   x      x      x         x       x     x          x     -               -
"""
ABSENT = {"zero": "no zero-experts", "shared-sharded": "no shared expert", "shared-whole": "no shared expert"}

EXPERTS = 8
HALVES, MOST_ON_ONE, NONE_ON_FIRST = [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1], [1] * 8
TWICE = [[0], [1, 8], [2], [3], [4, 9], [5], [6], [7]]  # experts 1 and 4 are held on both ranks
ANY_TOKENS = {"layout": "ep", "dispatcher": "dispatchers:all_to_all_dedup"}
# For each layout the worlds it is judged on: (ranks, what the task needs beyond the family's block).
LAYOUTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "TP": [(2, {"layout": "tp", "tokens": [5]}), (4, {"layout": "tp", "tokens": [3]})],
    "EP": [(2, {"layout": "ep", "dispatcher": "dispatchers:local_allreduce", "owner": HALVES, "tokens": [6]})],
    "TPxEP": [(4, {**ANY_TOKENS, "layout": "tp_ep", "owner": HALVES, "tokens": [3, 2]})],
    "DPxEP": [(2, {**ANY_TOKENS, "owner": HALVES, "tokens": [0, 6]}),
              (4, {**ANY_TOKENS, "owner": [0, 0, 1, 1, 2, 2, 3, 3], "tokens": [4, 0, 1, 3]})],
    "sequence": [(2, {"layout": "sequence", "tokens": [4, 1]}), (4, {"layout": "sequence", "tokens": [2, 1, 0, 3]})],
    "uneven": [(2, {**ANY_TOKENS, "owner": MOST_ON_ONE, "tokens": [4, 3]})],
    "idle": [(2, {**ANY_TOKENS, "owner": NONE_ON_FIRST, "tokens": [4, 3]})],
    "redundant": [(2, {**ANY_TOKENS, "replicas": TWICE, "owner": [*HALVES, 1, 0], "tokens": [6, 3]})],
    "zero": [(2, {**ANY_TOKENS, "owner": HALVES, "zero": 4, "tokens": [5, 4]}),
             (2, {"layout": "sequence", "zero": 4, "tokens": [5, 4]})],
}  # fmt: skip
for kind in ("sharded", "whole"):
    LAYOUTS[f"shared-{kind}"] = [
        (ranks, {**spec, "shared": "sharded" if kind == "sharded" else "replicated"})
        for layout in ("TP", "TPxEP", "sequence", "DPxEP") for ranks, spec in LAYOUTS[layout]
    ]  # fmt: skip


def cells() -> dict[tuple[str, str], str]:
    """(family, layout) -> mark, as the matrix says."""
    head, *rows = (line.split() for line in MATRIX.strip().splitlines())
    return {(row[0], layout): mark for row in rows for layout, mark in zip(head, row[1:], strict=True)}


def test_no_cell_is_missing() -> None:
    marks = cells()
    assert set(marks) == set(product(FAMILIES, LAYOUTS)), "a family or a layout is missing in the matrix"
    assert {layout for (_, layout), mark in marks.items() if mark != "x"} <= set(ABSENT)
    assert set(marks.values()) == {"x", "-"}


@pytest.mark.parametrize(("family", "layout"), list(cells()), ids="-".join)
def test_as_on_one_rank(family: str, layout: str) -> None:
    if cells()[family, layout] != "x":
        pytest.skip(f"{family} has {ABSENT[layout]}")
    for ranks, needs in LAYOUTS[layout]:
        for seed in range(2):
            check({"experts": EXPERTS, "dtype": "fp32", "family": family, **needs}, ranks, seed)
