"""The sum over ranks through symmetric memory: its kernel interpreted, in an order of arrival that shows its faults."""

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from moe_harness.harness.core.case import parse_id
from moe_harness.harness.ranks import judge, pool
from moe_harness.harness.stages.reduction import cases
from moe_harness.suites.compiled import for_hopper
from moe_harness.suites.reduction.planted_sum_norm import FAULTS, RIGHT, WORDS

TASKS, RANKS = "moe_harness.suites.reduction.sum_norm_tasks", 3  # of two ranks' parts either order is the same sum


def complaints(dtype: str, **spec: Any) -> list[str]:
    outcome = pool.run(f"{TASKS}:run", {"dtype": dtype, **spec}, ranks=RANKS, budget=8)
    assert outcome.ok, outcome.failure
    told = [line for result in outcome.results for line in result["told"]]
    differ = len({result["digest"] for result in outcome.results}) > 1
    return told + (["the ranks hold different bits"] if differ else [])


@pytest.mark.parametrize("words", [True, False], ids=["words", "rows"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_rank_holds_the_sum_in_order_with_residual_and_norm(dtype: str, words: bool) -> None:
    assert complaints(dtype, words=words) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_words_may_come_after_what_is_told_of_them(dtype: str) -> None:
    assert complaints(dtype, fault=RIGHT, early=True) == []


@pytest.mark.parametrize("words", [True, False], ids=["words", "rows"])
def test_another_number_of_rows_gives_nan(words: bool) -> None:
    assert pool.run(f"{TASKS}:other_rows", {"words": words}, ranks=RANKS, budget=8).results == [[]] * RANKS


@pytest.mark.parametrize("name", [name for name in FAULTS if name != RIGHT])
def test_a_planted_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]
    spec = {"fault": name, "words": fault.kernel == WORDS, "early": fault.early}
    if fault.seen == "NaN":
        outcome = pool.run(f"{TASKS}:other_rows", spec, ranks=RANKS)
        told = [line for result in outcome.results for line in result]
    else:
        told = complaints(fault.dtype, **spec)
    assert any(fault.seen in line for line in told), told


def test_every_fault_is_planted_where_it_says() -> None:
    assert pool.run(f"{TASKS}:not_planted", {}, ranks=RANKS).results == [[]] * RANKS


def test_it_is_a_reduction() -> None:
    """The stage's own cases, what it leaves to the plain reduction among them."""
    planned = [p for p in cases.plan([2]) if p.case.groups == 1 and p.case.rows() < 20]
    for each in [p for p in planned if p.case.routed == "partial" and not p.case.sequence] + planned[::9]:
        verdict = judge.judge("suites/reduction/interpreted.py:reduction", each.id)
        assert verdict.passed, (verdict.findings, verdict.unsupported)


def test_it_is_refused_without_gpus() -> None:
    case = next(p.id for p in cases.plan([2]) if parse_id(p.id)[2].routed == "partial")
    assert "nccl" in str(judge.judge("parallel:symmetric", case).unsupported)


COMPILE = """
from moe_harness.impls.parallel import _sum_norm

x, numbers = torch.empty(64, 2048, dtype=torch.bfloat16), torch.empty(128, dtype=torch.int64)
constants = dict(ADD=True, NORM=True, RANK=0, RANKS=2, PROGRAMS=128, BLOCK=2048, WIDEN=False, PDL=True)
for part, kind in (
    (x, dict(SLOTS=0, PIECES=1, HAS_MAP=False)), (x, dict(SLOTS=8, PIECES=1, HAS_MAP=True)),
    (x.float(), dict(SLOTS=0, PIECES=4, HAS_MAP=False)), (x.float(), dict(SLOTS=0, PIECES=1, HAS_MAP=False)),
):
    given = (part, x, numbers, numbers, x, x[0], x, x, 64, numbers, numbers, 1e-6, 256, 2048, 4096, 1 << 21, 64, 128)
    options = dict(grid=(128,), launch_pdl=True, num_warps=8, **constants, **kind)
    in_words = _sum_norm.sum_norm_in_words
    for kernel in (_sum_norm.sum_norm.warmup(*given, **options), in_words.warmup(*given, 1024, BITS=16, **options)):
        print(kernel.asm["ptx"])
        print("end of a kernel")
"""


def test_it_compiles_for_hopper_with_flags_that_the_whole_system_sees() -> None:
    raised, seen = r"atom\.global\.(sys\.release|release\.sys)\.exch", r"global\.(sys\.acquire|acquire\.sys)"
    of_rows = (raised, seen, r"ld\.global\.cg\.v4", r"st\.global\.v4", r"griddepcontrol\.wait")
    of_words = (r"ld\.volatile\.global\.b64", r"st\.global\.b64", r"griddepcontrol\.wait")
    kernels = for_hopper(COMPILE).split("end of a kernel")[:-1]
    assert len(kernels) == 8
    for number, text in enumerate(kernels):
        for wanted in of_words if number % 2 else of_rows:
            assert re.search(wanted, text), f"kernel {number} should use {wanted}"
