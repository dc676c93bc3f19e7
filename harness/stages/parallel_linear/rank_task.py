"""What one rank does for a case of the stage `parallel_linear`: load, run, compare with its part of the reference.

No rank talks to another: what a rank's part of the result is follows from the shard functions of the reference alone,
exactly, and a row-parallel layer's parts are judged unreduced, so that a layer which reduces by itself is caught.
"""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core import blame
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.findings import RankReport
from moe_harness.harness.core.ranked_subject import load_checked
from moe_harness.harness.core.ranked_task import Rank, Refused, differing_rows, enter, same_bits, wrong_rows
from moe_harness.harness.stages.parallel_linear.cases import LinearCase
from moe_harness.reference import parallel_linear as reference
from moe_harness.reference.grouped_linear import grouped_linear

# By the class's name, longest first; a class may also say it in the attribute `kind`.
NAMES = {"merged": "merged_column", "column": "column", "row": "row", "replicated": "replicated"}


def kind_of(subject: Any) -> str:
    """Which layer a class is; one whose `output` is "partial" as a class attribute is row-parallel.

    Raises:
        UsageError: neither its attribute `kind` nor its name tells.
    """
    name = getattr(subject, "__name__", "")
    found = getattr(subject, "kind", None) or next((k for part, k in NAMES.items() if part in name.lower()), None)
    found = found or ("row" if getattr(subject, "output", None) == "partial" else None)
    if found not in reference.KINDS:
        raise UsageError(f"{name} is of no known kind; its name should hold Replicated, Column, MergedColumn or Row, "
                         f"or its attribute 'kind' be one of {', '.join(reference.KINDS)}")  # fmt: skip
    return found


def traits(me: Rank, spec: dict[str, str], seed: int) -> dict[str, str]:
    """Task: which kind of layer spec["impl"] is."""
    return {"kind": kind_of(load_checked("parallel_linear", spec["impl"]))}


def run(me: Rank, spec: dict[str, str], seed: int) -> RankReport:
    """Task: spec = {"impl": ..., "case": id}.  Returns a RankReport."""
    _, _, case = parse_id(spec["case"])
    subject = load_checked("parallel_linear", spec["impl"])
    report = RankReport(me.rank)
    assert isinstance(case, LinearCase)
    if kind_of(subject) != case.kind:
        report.rejected = f"{spec['impl']} is {kind_of(subject)}, the case asks for {case.kind}"
        return report
    try:
        weights, x, layer, out = _run(me, subject, case, report)
        if not case.is_uneven:
            _compare(me, out, weights, x, case, report)
            if not report.findings:
                _call_again(me, layer, out, weights, x, case, report)
    except Refused as refusal:
        report.rejected = str(refusal)
    except Exception as error:
        if not case.optional or blame.is_judges(error) or blame.machine_trouble(error):
            raise
        report.rejected = f"{type(error).__name__}: {error}"
    if case.is_uneven:  # every rank takes part, whatever became of it
        widths = _widths(me, None if report.rejected is not None else out)
        if report.rejected is None:
            _compare_joined(me, out, widths, whole_of(weights, x, case), case, report)
    return report


def weights_of(case: LinearCase) -> tuple[list[list[Tensor]], Tensor]:
    """Checkpoint tensors [expert][part] of [N, K], and x [S, K]; small integers, so that products are exact."""
    random = torch.Generator().manual_seed(case.seed * 31 + case.K)
    dtype = DTYPES[case.dtype]
    # Each column of the weights has few entries, so that sums over K stay within the 8 bits of bf16, or 11.
    keep = max(1, min(case.K, 16))
    weights = []
    for _ in range(case.E):
        rows = sum(case.out_features)
        whole = torch.randint(-3, 4, (rows, case.K), generator=random)
        rank = torch.rand(rows, case.K, generator=random).argsort(-1).argsort(-1)
        weights.append(list((whole * (rank < keep)).to(dtype).split(case.out_features)))
    reach = (256 if case.dtype == "bf16" else 2048) // (3 * keep)
    return weights, torch.randint(-reach, reach + 1, (sum(case.group_sizes), case.K), generator=random).to(dtype)


def _run(me: Rank, subject: Any, case: LinearCase, report: RankReport) -> tuple[list[list[Tensor]], Tensor, Any, Any]:
    """Weights, x of all columns, the layer of this rank, and what it makes of its part."""
    weights, x = weights_of(case)
    place = {"rank": me.rank, "world_size": me.world_size, "dtype": x.dtype, "device": me.device}
    outer: int | list[int] = case.out_features if case.kind == "merged_column" else case.N
    layer = enter(me, subject, case.E, case.K, outer, **place)
    loaded = [[_as_stored(part, expert).to(me.device) for part in parts] for expert, parts in enumerate(weights)]
    for expert in _load_order(case):
        for number in _part_order(len(loaded[expert]), expert):
            named = {"shard_id": number} if case.kind == "merged_column" else {}
            enter(me, layer.load, expert, loaded[expert][number], **named)
    for part in (part for parts in loaded for part in parts):
        part.fill_(torch.nan)  # the layer keeps its own copy; the checkpoint's memory goes away
    out = _call(me, layer, x, case, report)
    if case.kind == "row" and getattr(layer, "output", None) != "partial":
        said = getattr(layer, "output", None)
        report.fail("contract", f"attribute output is {said!r}, but should be 'partial': the result is unreduced")
    return weights, x, layer, out


def _call(me: Rank, layer: Any, x: Tensor, case: LinearCase, report: RankReport) -> Any:
    """What the layer of this rank makes of its part of x."""
    mine = reference.input_shard(x, me.rank, me.world_size).contiguous() if case.kind == "row" else x.clone()
    given = mine.to(me.device)
    before = given.clone()
    out = enter(me, layer, given, torch.tensor(case.group_sizes, device=me.device))
    if not torch.equal(given, before):
        report.fail("inputs", "x was modified")
    return out


def _call_again(
    me: Rank, layer: Any, out: Tensor, weights: list[list[Tensor]], x: Tensor, case: LinearCase, report: RankReport
) -> None:
    """As many other rows: the layer keeps nothing of a call, and its result belongs to the caller."""
    kept, backwards = out.clone(), case.but(S="+".join(map(str, reversed(case.group_sizes))))
    later = _call(me, layer, x.flip(0), backwards, report)
    if not same_bits(out, kept):
        told = "the first result was changed by a second call, but a result belongs to the caller"
        report.fail("contract", f"rank {me.rank}: {told}")
    _compare(me, later, weights, x.flip(0), backwards, report, "in a second call, ")


def _widths(me: Rank, out: Any) -> list[int]:
    """Columns of every rank's result; -1 of one that has none."""
    widths = [0] * me.world_size
    own = out.shape[1] if isinstance(out, Tensor) and out.dim() == 2 else -1
    torch.distributed.all_gather_object(widths, own, group=me.group)
    return widths


def whole_of(weights: list[list[Tensor]], x: Tensor, case: LinearCase) -> list[Tensor]:
    """The result over one rank of each weight of a layer, fp64 [S, N]."""
    sizes = torch.tensor(case.group_sizes)
    return [
        grouped_linear(x.double(), torch.stack([parts[number] for parts in weights]).double(), sizes)
        for number in range(len(weights[0]))
    ]


def _compare_joined(
    me: Rank, out: Any, widths: list[int], whole: list[Tensor], case: LinearCase, report: RankReport
) -> None:
    """However the ranks split what they cannot share evenly, their results side by side are the whole one."""
    if min(widths) < 0 or sum(widths) != case.N * len(whole) or any(width % len(whole) for width in widths):
        report.fail("contract", f"the ranks' results have {widths} columns, but should have {case.N * len(whole)} in "
                    f"all, or all refuse an N of {case.N}")  # fmt: skip
        return
    start, end = (sum(widths[:rank]) // len(whole) for rank in (me.rank, me.rank + 1))
    expected = torch.cat([part[:, start:end] for part in whole], 1)
    wrong = differing_rows(out.cpu().double(), expected)
    if len(wrong):
        report.fail("shard", f"rank {me.rank}: {len(wrong)} of {len(expected)} rows differ from columns {start} to "
                    f"{end - 1} of the whole result; an N of {case.N} may be refused")  # fmt: skip


def _as_stored(part: Tensor, expert: int) -> Tensor:
    """A copy; of every second expert with rows that lie apart, as in a view of a larger tensor of the checkpoint."""
    if expert % 2 == 0:
        return part.clone()
    return torch.nn.functional.pad(part, (0, 3), value=torch.nan)[:, : part.shape[1]]


def _load_order(case: LinearCase) -> list[int]:
    """Experts arrive in the order of the files, which is not theirs."""
    return sorted(range(case.E), key=lambda expert: (expert * 7 + 3) % 5)


def _part_order(count: int, expert: int) -> list[int]:
    """Nor do the weights of every expert arrive in theirs: those of some come last first."""
    return list(range(count))[:: -1 if expert % 3 == 0 else 1]


def expected_part(weights: list[list[Tensor]], x: Tensor, case: LinearCase, rank: int) -> Tensor:
    """This rank's part of the result in fp64, [S, N or N / R]."""
    ranks, stacked = case.R, []
    for parts in weights:
        if case.kind == "column":
            stacked.append(reference.column_shard(parts[0], rank, ranks))
        elif case.kind == "merged_column":
            stacked.append(reference.merged_column_shard(parts, rank, ranks))
        else:
            stacked.append(reference.row_shard(parts[0], rank, ranks) if case.kind == "row" else parts[0])
    rows = reference.input_shard(x, rank, ranks) if case.kind == "row" else x
    return grouped_linear(rows.double(), torch.stack(stacked).double(), torch.tensor(case.group_sizes))


def _compare(
    me: Rank, out: Any, weights: list[list[Tensor]], x: Tensor, case: LinearCase, report: RankReport, when: str = ""
) -> None:
    expected = expected_part(weights, x, case, me.rank)
    wrong = wrong_rows(out, expected, x.dtype, report)
    if not len(wrong):
        return
    got = out.cpu().double()
    row = int(wrong[0])
    column = int(differing_rows(got[row, :, None], expected[row, :, None])[0])
    expert = int(torch.bucketize(row, torch.tensor(case.group_sizes).cumsum(0), right=True))
    report.fail(
        "shard",
        f"rank {me.rank}: {when}{len(wrong)} of {len(expected)} rows differ; first is row {row} (expert {expert}), "
        f"column {column}: {got[row, column]:g}, but should be {expected[row, column]:g}",
        where={"rank": me.rank, "row": row, "expert": expert, "column": column},
        diagnosis=_explain(got, weights, x, case, me.rank),
    )


def _explain(got: Tensor, weights: list[list[Tensor]], x: Tensor, case: LinearCase, rank: int) -> list[dict[str, str]]:
    """Other shards and other splits that the result equals."""
    found = []
    for other in range(case.R):
        if other != rank and _equal(got, expected_part(weights, x, case, other)):
            found.append({"fault": "shard of another rank", "evidence": f"the result is that of rank {other}"})
    whole = grouped_linear(
        x.double(), torch.stack([torch.cat(p) for p in weights]).double(), torch.tensor(case.group_sizes)
    )
    if case.kind == "row" and _equal(got, whole):
        found.append({"fault": "reduced already", "evidence": "the result is the whole sum, not this rank's part"})
    shared = case.R > 1 and not case.K % case.R  # else no part of the columns is a rank's
    if case.kind == "replicated" and shared and _equal(got, _row_part(weights, x, case, rank)):
        evidence = "the result is the product over this rank's columns of the weight only, a partial sum"
        found.append({"fault": "row-parallel where replicated is meant", "evidence": evidence})
    if case.kind == "merged_column" and _equal(got, whole.chunk(case.R, dim=1)[rank]):
        evidence = "the result is a shard of the stacked weight, not the stack of each weight's shard"
        found.append({"fault": "fused weight split in one piece", "evidence": evidence})
    arrived = [[parts[n] for n in _part_order(len(parts), expert)] for expert, parts in enumerate(weights)]
    same_sizes = len({len(part) for part in weights[0]}) == 1
    if case.kind == "merged_column" and same_sizes and _equal(got, expected_part(arrived, x, case, rank)):
        evidence = "the parts of each expert are stacked in the order in which they were loaded"
        found.append({"fault": "shard_id ignored", "evidence": evidence})
    return found


def _row_part(weights: list[list[Tensor]], x: Tensor, case: LinearCase, rank: int) -> Tensor:
    parts = torch.stack([reference.row_shard(part[0], rank, case.R) for part in weights])
    rows = reference.input_shard(x, rank, case.R)
    return grouped_linear(rows.double(), parts.double(), torch.tensor(case.group_sizes))


def _equal(got: Tensor, other: Tensor) -> bool:
    return got.shape == other.shape and not len(differing_rows(got, other))
