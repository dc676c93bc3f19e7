"""What one rank does for a case of the stage `gather`."""

import torch

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.findings import RankReport
from moe_harness.harness.core.ranked_cases import numbers
from moe_harness.harness.core.ranked_subject import load_checked
from moe_harness.harness.core.ranked_task import Rank, Refused, digest, enter


def run(me: Rank, spec: dict[str, str], seed: int) -> RankReport:
    """Task: every rank has to end with the rows of all."""
    case, report = parse_id(spec["case"])[2], RankReport(me.rank)
    parts = [torch.full((rows, 4), float(r + 1), dtype=DTYPES[case.dtype]) for r, rows in enumerate(numbers(case.T))]
    try:
        got = enter(me, load_checked("gather", spec["impl"]), parts[me.rank].clone(), me.group)
    except Refused as refusal:
        report.rejected = str(refusal)
        return report
    report.observed["digest"] = digest(got)
    if not torch.equal(got, torch.cat(parts)):
        report.fail("rows", f"rank {me.rank} has other rows than all ranks together")
    return report
