"""What the recorder hands on in place of an operator's work."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from moe_harness.harness.ranks import comm


def test_a_work_that_holds_none_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's NCCL returns such a one for async_op=False, and torch.distributed then waits for nothing."""
    monkeypatch.setattr(dist.Work, "unbox", lambda boxed: None)
    boxed, recorder = object(), SimpleNamespace(works=[], started={})
    assert comm._with_work(boxed, lambda work: comm._watched(work, recorder, None, None, None, True)) is boxed
    assert not recorder.works


@pytest.mark.parametrize("outputs", [(None,), ("out",), ("out", None)])
def test_of_several_results_the_last_is_the_work(outputs: tuple[object, ...]) -> None:
    """Whatever comes before it is handed on; some operators have no work."""
    assert comm._with_work((*outputs, "work"), str.upper) == (*outputs, "WORK")
    assert comm._with_work((*outputs, None), str.upper) == (*outputs, None)
    assert comm._with_work("work", str.upper) == "WORK" and comm._with_work(None, str.upper) is None
