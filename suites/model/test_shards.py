"""Reading the files of a checkpoint by offsets: every byte, in order, in pieces, and a file that changes meanwhile."""

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_harness.fixtures import checkpoints
from moe_harness.impls.qwen3_moe import shards
from moe_harness.impls.qwen3_moe.config import CheckpointError, Config
from moe_harness.impls.qwen3_moe.loader import load
from moe_harness.impls.qwen3_moe.weights import Layout


@pytest.fixture
def held(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file and what is in it: rows shorter and longer than a block, and a vector."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"wide": (5, 200), "flat": (700,), "cube": (9, 3, 7), "one": (1, 1)}
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float32)
    tensors = {
        name: torch.randn(shape, generator=draw).to(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors", tensors


@pytest.mark.parametrize("readers", [1, 3])
def test_rows_come_whole_and_in_order(
    readers: int, held: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind whoever looks at them for a while: a buffer is filled again once its rows are done with."""
    monkeypatch.setattr(shards, "BLOCK", 100)
    monkeypatch.setattr(shards, "READERS", readers)
    file, tensors = held
    found = shards.opened(file)
    assert {name: stored.shape for name, stored in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    wanted = [run for stored in found.values() for run in shards.runs(stored, range(stored.shape[0]))]
    got: dict[str, list[Tensor]] = {}
    for run, rows in shards.read(wanted):
        time.sleep(0.001)
        got.setdefault(run.stored.key, []).append(rows.clone())
    assert len(got["wide"]) == 5 and len(got["flat"]) == 28, "a row is longer than a block, 25 numbers fill one"
    assert all(torch.equal(torch.cat(got[name]), tensor) for name, tensor in tensors.items())


def test_some_rows_are_read_alone(held: tuple[Path, dict[str, Tensor]]) -> None:
    file, tensors = held
    (got,) = shards.read(shards.runs(shards.opened(file)["cube"], range(4, 7)))
    assert torch.equal(got[1], tensors["cube"][4:7]) and got[0].bytes == 3 * 3 * 7 * 2


def test_a_file_that_ends_early_is_told(held: tuple[Path, dict[str, Tensor]]) -> None:
    """Cut off behind the look at its header, which knows its size."""
    file, _ = held
    found = shards.opened(file)
    last = max(found.values(), key=lambda stored: stored.offset)
    with file.open("r+b") as stream:
        stream.truncate(last.offset + 1)
    with pytest.raises(CheckpointError, match=f"it ends in the middle of {last.key}"):
        list(shards.read(shards.runs(last, range(last.shape[0]))))


def test_readers_end_with_whoever_reads(held: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 100)
    before = threading.active_count()
    reading = shards.read(shards.runs(shards.opened(held[0])["flat"], range(700)))
    next(reading)
    assert threading.active_count() > before
    reading.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_parameters_are_the_same_whatever_a_block_holds(
    expert_parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.make(tmp_path, "qwen3_moe", shards=2)
    layout = Layout(Config.read(tmp_path), 1, 2, expert_parallel)
    found = []
    for block in (8 << 20, 300):
        monkeypatch.setattr(shards, "BLOCK", block)
        found.append(layout.empty(torch.bfloat16, "cpu"))
        load(tmp_path, layout, found[-1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in layout.shapes)
