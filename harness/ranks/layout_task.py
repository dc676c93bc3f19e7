"""What one rank does for a case of `layouts`: hand over its parts, and compare what comes out with the whole layer.

A reduction takes (routed, shared, group, rows), each part with `.tensor` and `.state`, and returns this rank's output.
The parts are small integers, so that routed + shared is exact in every dtype and in any order.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.ranks.cases import LayoutCase, parse_id
from moe_harness.harness.ranks.loading import load
from moe_harness.harness.ranks.results import Report, differing_rows, digest
from moe_harness.harness.ranks.worker import Rank
from moe_harness.harness.ranks.world_data import TORCH_DTYPES
from moe_harness.harness.stages.layouts.faults.reductions import fit, name_fit


class State(Enum):
    """What a tensor is over the ranks."""

    PARTIAL = "the sum over ranks is the value"
    REPLICATED = "every rank holds the value"


@dataclass(frozen=True)
class Placed:
    """A tensor [T, H] and its state."""

    tensor: Tensor
    state: State


def run(me: Rank, spec: dict[str, str], seed: int) -> dict[str, Any]:
    """Task: spec = {"impl": ..., "case": id}.  Returns a Report as plain data."""
    _, case = parse_id(spec["case"])
    assert isinstance(case, LayoutCase)
    report = Report(me.rank)
    routed, shared = _parts(case), _parts(case.but(seed=case.seed + 1))
    if case.shared == "replicated":
        shared = shared[:1].expand_as(shared)
    whole = shared[0] if case.shared == "replicated" else shared.sum(0)
    dtype = TORCH_DTYPES[case.dtype]
    states = State.PARTIAL, State.REPLICATED if case.shared == "replicated" else State.PARTIAL
    mine = [Placed(p[me.rank].to(dtype).to(me.device), s) for p, s in zip((routed, shared), states, strict=True)]
    out = load("layouts", spec["impl"])(*mine, me.group, None)
    _compare(me, out, routed.sum(0), whole, report)
    return report.as_dict()


def _parts(case: LayoutCase) -> Tensor:
    """What each rank holds, [R, T, H] in fp64."""
    random = torch.Generator().manual_seed(case.seed)
    return torch.randint(-4, 5, (case.R, case.T, case.H), generator=random).double()


def _compare(me: Rank, out: Tensor, routed: Tensor, shared: Tensor, report: Report) -> None:
    got, expected = out.cpu().double(), routed + shared
    report.observed["digest"] = digest(got)
    wrong = differing_rows(got, expected)
    if not len(wrong):
        return
    token = int(wrong[0])
    column = int(differing_rows(got[token, :, None], expected[token, :, None])[0])
    a, b, residual = fit(got, routed, shared)
    report.fail(
        "reduction",
        f"rank {me.rank}: {len(wrong)} of {len(expected)} tokens differ from the layer on one rank; first is token "
        f"{token}, column {column}: {got[token, column]:g}, but should be {expected[token, column]:g}",
        where={"rank": me.rank, "token": token, "column": column},
        diagnosis=[{"fault": name_fit(a, b, residual, me.world_size), "evidence": _evidence(a, b, residual)}],
    )


def _evidence(a: float, b: float, residual: float) -> str:
    return f"output = {a:.4g} * routed + {b:.4g} * shared leaves {residual:.2g} of it unexplained"
