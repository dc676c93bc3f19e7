"""Every entry of every tuned file of the Triton experts, forced alone, gives the right result, cold and warm.

An entry is only chosen at its own shape and batch, so a tile that is wrong at a tail or with an empty expert would show
nowhere else.  Here each runs on a small layer that has all of that: sizes that no tile divides, masked slots, an expert
without a row and one with many.  On a GPU the entry runs as it is; under the interpreter (TRITON_INTERPRET=1) tiles are
cut down to what it can run in a moment, and the way through the kernel (swapped, persistent, by expert, walk) is kept.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moe_harness.harness.core import bounds
from moe_harness.harness.stages.experts.bound import experts_bound
from moe_harness.impls.triton import configs, grouped_linear
from moe_harness.impls.triton._common import on_hopper
from moe_harness.impls.triton.experts import experts, run_entry
from moe_harness.suites.triton import CUDA, DEVICE, runnable

pytestmark = runnable
HIDDEN, WIDTH, EXPERTS, TOP_K = (520, 264, 7, 3) if CUDA else (40, 24, 5, 2)


def tuned_entries() -> Iterator[tuple[str, configs.Entry]]:
    """Every entry of every committed file, named by file and number of tokens."""
    devices = {path.name.split(".")[0] for path in configs.TUNED.glob("*.json")}
    for device in sorted(devices):
        for shape, entries in configs.tuned_files(device):
            for tokens, entry in entries:
                yield f"{device}-E{shape.experts}-H{shape.hidden}-T{tokens}", entry


def cut_down(entry: configs.Entry) -> configs.Entry:
    """The entry with tiles that the interpreter runs in a moment, and without what means nothing there."""
    if CUDA:
        return entry
    if entry.walk is not None:
        return configs.Entry(walk=configs.Walk(up_n=16, up_k=32, down_n=16, down_k=32))
    small = {"m": 16, "n": 16, "k": 32, "tma": False, "tail": False, "copier": False, "group": 8}
    small |= {"warps": 4, "stages": 3}
    tilings = (replace(t, waves=min(t.waves, 1), extra=min(t.extra, 16), **small) for t in (entry.gate_up, entry.down))
    return configs.Entry(None, *tilings)


def to_be_forced() -> Iterator[str]:
    """On a GPU every distinct entry; interpreted, those that take a way through a kernel that none before it takes."""
    seen: set[object] = set()
    for name, entry in ENTRIES.items():
        ways = {cut_down(entry)} if CUDA else {("up", cut_down(entry).gate_up), ("down", cut_down(entry).down)}
        if not ways <= seen:
            yield name
        seen |= ways


ENTRIES = dict(tuned_entries())


def layer(
    tokens: int, seed: int = 0, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """A small layer and a batch: the last expert has no row, the first many, some slots are masked."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=draw)
    up = torch.randn(EXPERTS, 2 * WIDTH, hidden, generator=draw) * hidden**-0.5
    down = torch.randn(EXPERTS, hidden, WIDTH, generator=draw) * WIDTH**-0.5
    ids = torch.rand(tokens, EXPERTS - 1, generator=draw).topk(TOP_K, dim=-1).indices
    ids[::2, 0] = 0
    ids[1::5, -1] = -1
    weights = torch.rand(tokens, TOP_K, generator=draw)
    return tuple(t.to(DEVICE, dtype) for t in (x, up, down, weights)) + (ids.to(DEVICE),)


def run(entry: configs.Entry, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return run_entry(cut_down(entry), *batch, "silu", None, batch[-1].numel())


def worst(result: torch.Tensor, batch: tuple[torch.Tensor, ...], activation: str = "silu") -> float:
    """Largest error in sigmas of the bound."""
    bound = experts_bound(*batch, activation=activation, expert_map=None, declared=experts.rounds)
    return float(bound.z(result).abs().nan_to_num(float("inf")).amax())


def test_there_are_tuned_entries() -> None:
    assert len(ENTRIES) >= 40, f"{len(ENTRIES)} entries were found, but five shapes are committed"


@pytest.mark.parametrize("name", list(to_be_forced()))
def test_entry_is_right_cold_and_warm(name: str) -> None:
    """The first call may compile and the second may not; other inputs in between leave nothing behind."""
    batch, other = layer(200 if CUDA else 9), layer(33 if CUDA else 4, seed=1)
    cold = run(ENTRIES[name], batch)
    between = run(ENTRIES[name], other)
    warm = run(ENTRIES[name], batch)
    assert torch.equal(cold, warm), "a second call on the same inputs gives other bits"
    limit = bounds.max_limit()
    assert worst(cold, batch) <= limit, (
        f"{name} is {worst(cold, batch):.1f} sigma off, but should be within {limit:.1f}"
    )
    assert worst(between, other) <= limit, f"{name} is {worst(between, other):.1f} sigma off on the second batch"


HEIGHTS = {
    "half a tile": configs.Tiling(64, 16, 32, tail=True),
    "extra rows": configs.Tiling(16, 16, 32, extra=16),
    "extra rows, swapped": configs.Tiling(16, 16, 32, extra=16, swap=True),
    "extra rows or half a tile, by expert": configs.Tiling(32, 16, 32, extra=16, tail=True, by_expert=True),
    "extra rows, paired, persistent": configs.Tiling(64, 16, 32, extra=64, waves=1),
}


@pytest.mark.parametrize("rows", [17, 33, 65])
@pytest.mark.parametrize("name", HEIGHTS)
def test_tiles_of_every_height(name: str, rows: int) -> None:
    """One expert with as many rows as end a tile, fill the rows beside it, or go one past them."""
    batch = layer(rows)
    batch[-1][:] = torch.tensor([0, *[-1] * (TOP_K - 1)], device=DEVICE)
    entry = configs.Entry(gate_up=HEIGHTS[name], down=configs.Tiling(16, 32, 32))
    result = run_entry(entry, *batch, "silu", None, batch[-1].numel())
    assert worst(result, batch) <= bounds.max_limit()


COPYING = configs.Tiling(128, 128, 64, warps=8, copier=True)


@pytest.mark.skipif(not CUDA, reason="the interpreter cannot run Gluon")
@pytest.mark.parametrize("rows", [1, 64, 65, 128, 129, 192, 193, 385, 9000])
@pytest.mark.parametrize("activation, dtype", [("silu", torch.bfloat16), ("gelu_tanh", torch.float16)])
def test_kernels_with_copying_warps(rows: int, activation: str, dtype: torch.dtype) -> None:
    """An expert with rows that end a unit or a tile, or go one past them, or with more tiles than there are programs,
    beside others; weights and hidden states that lie apart in memory; the same bits whoever takes a tile."""
    x, up, down, weights, ids = layer(rows, hidden=576, dtype=dtype)
    ids[ids == 0] = 1
    ids[:, 0] = 0
    if not on_hopper(x.device):
        pytest.skip("needs a Hopper GPU and a Triton with Gluon")
    from moe_harness.impls.triton import _gate_up_hopper, _hopper

    x, up, down = torch.cat([x, x], 1)[:, :576], torch.cat([up, up], 2)[..., :576], torch.cat([down, down], 1)[:, :576]
    assert _gate_up_hopper.fits(x, up), "this layer should be one that the first kernel takes"
    assert _hopper.suits(x, down), "this layer should be one that the second kernel takes"
    batch = (x, up, down, weights, ids)
    entry = configs.Entry(gate_up=COPYING, down=COPYING)
    results = [run_entry(entry, *batch, activation, None, ids.numel()) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert worst(results[0], batch, activation) <= bounds.max_limit()


def test_nearest_entry_has_the_rows_per_expert() -> None:
    """At a tuned shape and number of tokens the lookup finds the entry of that number."""
    for shape, entries in configs.tuned_files("NVIDIA_H200"):
        for tokens, entry in entries:
            rows = tokens * shape.top_k / shape.experts
            nearest = min(entries, key=lambda e: abs(e[0] * shape.top_k / shape.experts - rows))
            assert nearest[1] == entry


def test_tables_of_cards_of_one_capability_serve_each_other() -> None:
    own, all_hopper = configs.tuned_files("NVIDIA_H100_80GB_HBM3"), configs.tuned_files("NVIDIA_H100_80GB_HBM3", (9, 0))
    assert own and all_hopper[: len(own)] == own, "a card's own tables should come first"
    mixtral = configs.Shape(8, 4096, 14336, 2)
    assert mixtral not in [known for known, _ in own] and mixtral in [known for known, _ in all_hopper]
    assert len(configs.tuned_files("NVIDIA_GH200", (9, 0))) == len(list(configs.TUNED.glob("*.json")))
    assert not configs.tuned_files("NVIDIA_A100", (8, 0))


def test_shapes_far_from_all_files_use_the_generic_rules() -> None:
    shape = configs.Shape(3, 17, 5, 2)
    distances = [shape.distance(known) for known, _ in configs.tuned_files("NVIDIA_H200")]
    assert min(distances) > configs.NEAR
    assert configs.generic(shape, 4).walk is not None
    assert configs.generic(shape, 400).gate_up is not None


def test_other_element_sizes_are_never_near() -> None:
    shape = configs.Shape(128, 2048, 768, 8, element_size=4)
    assert all(shape.distance(known) == float("inf") for known, _ in configs.tuned_files("NVIDIA_H200"))


def test_grid_covers_every_tile_that_uniform_routing_needs() -> None:
    tiling = configs.Tiling(16, 64, 128)
    device = torch.device("cpu")
    assert configs.grid_size(tiling, slots=256, experts=128, columns=768, device=device) == (128 + 16) * 12
    assert configs.grid_size(replace(tiling, by_expert=True), 256, 128, 768, device) == 128 * 12


def test_grouped_linear_finds_a_tiling_for_any_shape() -> None:
    tiling = configs.choose_linear(configs.Shape(8, 64, 32, 1), 100, torch.device("cpu"))
    assert tiling.m >= 16
    assert grouped_linear.grouped_linear.deterministic
