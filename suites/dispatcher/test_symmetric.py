"""The symmetric dispatcher without GPUs: its kernels interpreted over shared memory, and its refusal."""

import pytest

pytest.importorskip("triton")

from harness.ranks import cases, judge
from suites.dispatcher.subjects import told

FILE = "suites/dispatcher/interpreted.py"


@pytest.mark.parametrize("name", ["Symmetric", "Bounded"])
@pytest.mark.parametrize("world", [2, 3])
def test_interpreted_equals_the_dense_layer(name: str, world: int) -> None:
    """Also where some ranks hold more tokens than are written directly: all ranks fall back then."""
    for check, case in list(cases.dispatcher_cases([world]))[::4]:
        verdict = judge.judge(f"{FILE}:{name}", cases.case_id(check, case))
        assert verdict.passed, f"{told(verdict)} {verdict.unsupported}"


def test_refused_on_every_rank_without_gpus() -> None:
    verdict = judge.judge("dispatchers:symmetric", "dispatcher/dense/R=2,E=4,k=2,T=2+2")
    assert not verdict.findings
    assert "gloo" in str(verdict.unsupported)
