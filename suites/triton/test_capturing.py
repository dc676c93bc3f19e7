"""While a graph is captured Python's collector rests: what it gives back may be of CUDA, which the capture forbids."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_harness.harness.core import cuda_graphs
from moe_harness.impls.capturing import capturing


class Cycle:
    """Only the collector gives it back."""

    def __init__(self, told: list[str]):
        self.told, self.own = told, self

    def __del__(self) -> None:
        self.told.append("given back")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's captures with nothing behind them."""

    @contextlib.contextmanager
    def graph(graph: Any, **options: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_graphs, "restore_generator", lambda: None)


def allocate(fails: bool) -> list[str]:
    """What the collector gave back while enough was made for it to run several times."""
    told: list[str] = []
    Cycle(told)
    many = [[number] for number in range(200_000)]
    assert len(many) == 200_000
    if fails:
        raise RuntimeError("not captured")
    return told


def by_impls(fails: bool) -> list[str]:
    with capturing(torch.cuda.CUDAGraph()):
        return allocate(fails)


def by_harness(fails: bool) -> list[str]:
    return cuda_graphs.captured(lambda: allocate(fails))[1]


@pytest.mark.parametrize("way", [by_impls, by_harness])
def test_the_collector_rests_during_a_capture(way: Any, captures: None) -> None:
    assert allocate(False) == ["given back"], "nothing would be seen"
    assert gc.isenabled() and way(False) == []
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="not captured"):
        way(True)
    assert gc.isenabled()
    gc.disable()
    try:
        way(False)
        assert not gc.isenabled(), "it was not to run before either"
    finally:
        gc.enable()
