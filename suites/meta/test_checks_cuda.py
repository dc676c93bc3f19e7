"""Graph replay and side streams judge what is written in place too; a stand-in for CUDA runs them on a CPU."""

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_harness.harness.checks import cuda
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.contracts import Declarations, Subject
from moe_harness.harness.core.invocation import Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process.worker import _is_device_lost, judge_id
from moe_harness.harness.stages.rope_cache.cases import RopeCacheCase
from moe_harness.harness.stages.rope_cache.faults import cuda as faults


class Graph:
    """Does the work of a captured call again, into the results of the capture."""

    def __init__(self, run: Callable[[], Any]):
        self.run, self.result = run, run()

    def replay(self) -> None:
        for old, new in zip(cuda.returned(self.result), cuda.returned(self.run()), strict=True):
            old.copy_(new)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda with nothing behind it; a capture runs, and so does a replay."""
    under_way = [False]

    def captured(run: Callable[[], Any]) -> tuple[Graph, Any]:
        under_way[0] = True
        graph = Graph(run)
        return graph, graph.result

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    monkeypatch.setattr(cuda, "captured", captured)
    monkeypatch.setattr(cuda, "_churn", lambda trial, case: trial.invoke(trial.build(case.resized())))
    monkeypatch.setattr(faults, "capturing", lambda: under_way[0])
    faults._kept.clear()


def trial_of(stage: str, function: Callable[..., Any]) -> Trial:
    declared = Declarations(dtypes=("fp32",), graph_capturable=True)
    return Trial(Subject(stage, "kernel.py:kernel", function, declared, None), "cpu")


def found(check: str, function: Callable[..., Any]) -> list[str]:
    case = RopeCacheCase(T=8, order="head", seed=3)
    return [finding.message for finding in getattr(cuda, check)(trial_of("rope_cache", function), case).findings]


@pytest.mark.parametrize("check", ["graph_replay", "side_stream"])
def test_a_right_kernel_that_writes_in_place_passes(pretended: None, check: str) -> None:
    assert found(check, faults.run_captured) == []


def test_a_cache_written_where_the_capture_wrote_is_found(pretended: None) -> None:
    told = found("graph_replay", get("slots_of_the_capture").function)
    assert told[0].startswith("replay 0: key_cache: ")


def test_a_cache_written_before_the_slots_arrived_is_found(pretended: None) -> None:
    def early(*call: Any, **options: Any) -> torch.Tensor:
        return get("slots_of_the_capture").function(*call, **options)

    faults._kept.clear()
    calls = iter([False, False])  # what the first call, with the late operands, reads stays
    faults.capturing = lambda: next(calls, True)  # type: ignore[assignment]
    told = found("side_stream", early)
    assert told[0].startswith("key_cache: ")


def test_a_replay_that_writes_around_its_operands_is_found(pretended: None) -> None:
    """Guard words are looked at after a replay too."""

    def reckless(q: Any, *call: Any, **options: Any) -> torch.Tensor:
        if faults.capturing():
            q.as_strided((1,), (1,), q.storage_offset() - 1).fill_(1.0)
        return faults.run_captured(q, *call, **options)

    with pytest.raises(Exception, match="elements written outside of it"):
        found("graph_replay", reckless)


@pytest.mark.parametrize("check", ["graph_replay", "side_stream"])
def test_every_stage_with_a_capturable_kernel_has_cases(check: str) -> None:
    for stage in ("experts", "quantized_experts", "router", "grouped_linear", "shared_expert_gate", "moe_block",
                  "rms_norm", "rope_cache", "paged_attention", "sampler"):  # fmt: skip
        assert any(planned.check == check for planned in plan(stage, Request(device="cuda"))), stage


def leaves_an_error(x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None) -> Any:
    """Right, but a call of CUDA's runtime fails at the end, and nobody asks for its error."""
    whole = x.float() if residual is None else x.float() + residual.float()
    out = (whole * (whole.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)
    result = out if residual is None else (out, whole.to(x.dtype))
    ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}").cudaSetDevice(99)
    return result


@pytest.mark.gpu
def test_an_error_that_a_launch_leaves_behind_is_the_implementations() -> None:
    """vLLM launches a grid of no blocks where there are no tokens; the judge's own next kernel was told of it."""
    trial = Trial(Subject("rms_norm", "k.py:k", leaves_an_error, Declarations(dtypes=("fp32",)), None), "cuda")
    planned = next(p for p in plan("rms_norm", Request(device="cuda")) if p.check == "contract")
    answer = judge_id(trial, planned.id)
    assert answer.status == "failed" and "CUDA error" in answer.findings[0].message, answer


def test_a_device_is_lost_where_it_cannot_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All later calls of that process would fail, whoever makes them; a CPU is never lost."""

    def poisoned() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not _is_device_lost("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", poisoned)
    assert _is_device_lost("cuda") and not _is_device_lost("cpu")
