"""Right implementations are never failed: strangers' variants that round and sum in every way the contract allows."""

import pytest

from harness.cases.request import Request
from harness.engine import Options, judge
from harness.pool import prepare
from suites.meta.judging import functions_of

RIGHT = list(functions_of("right"))


def test_there_are_enough():
    assert len(RIGHT) >= 35


@pytest.mark.parametrize(("stage", "spec"), RIGHT, ids=[spec.rpartition("/")[2] for _, spec in RIGHT])
def test_passes_the_quick_profile(stage, spec):
    prepare()
    result = judge(stage, spec, Request(seed=1), Options())
    told = [f"{f['case']}: {f['message']}" for f in result["failures"][:3]]
    assert result["verdict"] == "pass", told or result["error"]
