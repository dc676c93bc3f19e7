"""Which dispatchers the suite judges: those of --impl where it is given, all registered ones otherwise."""

import pytest

from moe_harness.harness.ranks.judge import Verdict

REGISTERED = (
    "dispatchers:naive",
    "dispatchers:local_allreduce",
    "dispatchers:allgather_reducescatter",
    "dispatchers:all_to_all",
    "dispatchers:all_to_all_dedup",
    "dispatchers:masked",
)
# Worlds of the suites on GPUs; what this machine has too few GPUs for is skipped with their number.
GPU_WORLDS = [pytest.param(n, marks=pytest.mark.multigpu(n=n), id=f"{n}gpus") for n in (2, 4, 8)]


def chosen(config: pytest.Config, default: tuple[str, ...]) -> tuple[str, ...]:
    """Specs given by --impl, or `default`."""
    given = config.getoption("--impl", default=None)
    return tuple([given] if isinstance(given, str) else given) if given else default


def format_findings(verdict: Verdict) -> str:
    """The findings of a verdict as text, the case first."""
    lines = [f"{f.about}: {f.message}\n    {f.diagnosis[:4]}" for f in verdict.findings]
    return "\n".join([verdict.case, *lines])
