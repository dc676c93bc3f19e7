"""The sharded layers and the layouts on GPUs: the same cases and cells as on the CPU, one rank on each GPU.

tox -e multigpu
"""

import pytest

from moe_harness.harness.ranks import judge
from moe_harness.suites.dispatcher.subjects import GPU_WORLDS, chosen, format_findings
from moe_harness.suites.parallel_linear.test_layouts import check
from moe_harness.suites.parallel_linear.test_matrix import EXPERTS, LAYOUTS, cells
from moe_harness.suites.parallel_linear.test_parallel_linear import REGISTERED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", chosen(metafunc.config, tuple(f"parallel:{name}" for name in REGISTERED)))


@pytest.mark.parametrize("world", GPU_WORLDS)
def test_keeps_and_computes_its_part(impl: str, world: int) -> None:
    judged = 0
    for case in judge.planned("parallel_linear", impl, [world], backend="nccl"):
        verdict = judge.judge(impl, case, backend="nccl")
        judged += verdict.unsupported is None
        assert not verdict.findings, format_findings(verdict)
    assert judged, f"{impl} refuses every case: {verdict.unsupported}"


@pytest.mark.parametrize("world", GPU_WORLDS)
def test_layouts_as_on_one_rank(world: int) -> None:
    """Every cell of the matrix that has a world of this size."""
    run = [cell for cell, mark in cells().items() if mark == "x"]
    told_of = 0
    for family, layout in run:
        for ranks, needs in LAYOUTS[layout]:
            if ranks == world:
                check({"experts": EXPERTS, "dtype": "fp32", "family": family, **needs}, ranks, backend="nccl")
                told_of += 1
    if not told_of:
        pytest.skip(f"no layout of the matrix has {world} ranks")
