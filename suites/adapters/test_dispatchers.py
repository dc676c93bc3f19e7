"""Adapters of other projects' dispatchers hand over what those take, over two ranks and stand-ins of the libraries."""

import importlib.util
from pathlib import Path

import pytest

from moe_harness.harness.ranks import judge

STANDINS = Path(__file__).parent / "dispatcher_standins.py"
PLAIN, MASKED, FEWER = (
    f"dispatcher/dense/dtype=bf16,R=2,E=4,k=2,T={rest}" for rest in ("5+3", "0+6,ids=masked", "3+3,H=9")
)
CASES = [
    ("torchtitan", PLAIN, ""), ("torchtitan", MASKED, "no masked slot"), ("megatron", PLAIN, ""),
    ("megatron", MASKED, ""), ("deepep", PLAIN, ""), ("deepep", MASKED, ""), ("deepep", FEWER, "a multiple of 8"),
    ("megatron", "dispatcher/dense/R=2,E=3,k=2,T=2+2", "equal contiguous blocks"),
]  # fmt: skip
MISSING = {"torchtitan": "torchtitan", "megatron": "megatron", "deep_ep": "dispatchers:deepep"}


@pytest.mark.parametrize(("name", "case", "refused"), CASES)
def test_what_is_handed_over_means_what_the_library_takes_it_for(name: str, case: str, refused: str) -> None:
    verdict = judge.judge(f"{STANDINS}:{name}", case)
    assert not verdict.findings, verdict.findings[0]["message"]
    assert refused in str(verdict.unsupported) if refused else verdict.unsupported is None


@pytest.mark.parametrize("package", MISSING)
def test_without_the_library_the_line_that_installs_it_is_told(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    verdict = judge.judge(MISSING[package], PLAIN)
    assert not verdict.findings
    assert "which is not here" in str(verdict.unsupported)
    assert "pip install" in str(verdict.unsupported)
