"""From a case of `reduction` to the parts of all ranks: whole numbers that fill their dtype and whose sums are exact.

In every element one rank, drawn anew, holds a wide number and the others narrow ones, so that any sum of any of them,
in any order, has the very bits of the layer on one rank; what passes through fewer bits or a smaller range does not.

    |wide| <= w = 2^(p - 2), |narrow| <= w / R      p the bits of the dtype: routed and shared parts stay within 2^p
"""

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.ranked_cases import unit_of
from moe_harness.harness.stages.reduction.cases import ReductionCase
from moe_harness.reference.reduction import Partial, Placed, Replicated, Sharded


def parts_of(case: ReductionCase) -> tuple[Placed, Placed | None]:
    """Routed and shared part of all ranks of a group, in fp64."""
    random = torch.Generator().manual_seed(case.seed)
    own = case.routed == "complete" and (case.sequence or case.shared in ("none", "complete"))
    routed = _placed(case, case.routed, own, random, infinite=case.data == "infinite")
    shared = None if case.shared == "none" else _placed(case, case.shared, case.shared == "complete" and own, random)
    return routed, shared


def value_of(placed: Placed | None, rank: int, case: ReductionCase) -> Tensor | float:
    """What `rank` should hold of a part in the end."""
    if placed is None:
        return 0.0
    if isinstance(placed, Sharded):
        return placed.parts[rank]
    whole = placed.value()  # type: ignore[attr-defined]
    return whole.split(case.tokens)[rank] if case.sequence else whole


def _placed(case: ReductionCase, state: str, own: bool, random: torch.Generator, infinite: bool = False) -> Placed:
    """Parts in `state`: of each rank's own rows, or of all rows."""
    rows = sum(case.tokens)
    parts = _numbers(case, rows, case.members if state == "partial" else 1, random)
    if infinite and rows:  # one element of one rank; nothing else may change
        parts[-1][rows // 2, -1] = torch.inf
    if state == "partial":
        return Partial.of(parts)
    return Sharded.of(parts[0].split(case.tokens)) if own else Replicated.of(parts * case.members)


def _numbers(case: ReductionCase, rows: int, ranks: int, random: torch.Generator) -> list[Tensor]:
    """[rows, H] for each rank."""
    shape, wide = (rows, case.H), int(0.5 / torch.finfo(DTYPES[case.dtype]).eps)

    def draw(largest: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=random)

    holder, widest = torch.randint(0, ranks, shape, generator=random), draw(wide)
    return [
        torch.where(holder == rank, widest, draw(wide // ranks)).double() * unit_of(case.dtype) for rank in range(ranks)
    ]
