"""The plan of a run: which checks judge which cases of a stage."""

from typing import NamedTuple

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.folders import needed_part
from moe_harness.harness.core.request import Request

ON_CUDA_ONLY = {"graph_replay", "side_stream", "large_offsets"}
NEEDS_CUDA = "needs --device cuda"  # why these are skipped elsewhere


class Planned(NamedTuple):
    """One unit of work: a check on a case."""

    check: str
    case: Case

    @property
    def id(self) -> str:
        return f"{self.case.stage}/{self.check}/{self.case.id()}"


def plan(stage: str, request: Request) -> list[Planned]:
    """Every (check, case) of a run, in the order of judgement; equal ones appear once."""
    by_check = needed_part(stage, "cases").plan(request)
    return list(dict.fromkeys(Planned(check, case) for check, cases in by_check.items() for case in cases))
