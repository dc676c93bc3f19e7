"""The faults that need a GPU show there: graphs, streams, atomics, offsets beyond 2^31."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core import bounds
from moe_harness.harness.core.catalogue import all_faults, get
from moe_harness.harness.core.cuda_graphs import restore_generator
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.process.pool import Pool
from moe_harness.harness.stages.experts.bound import experts_bound
from moe_harness.harness.stages.experts.faults._steps import run

pytestmark = pytest.mark.gpu

GRAPH_FAULTS = (
    "graph_ignores_new_inputs", "replay_returns_the_one_before", "replays_accumulate", "graph_reads_freed_memory",
    "capture_takes_another_path",
)  # fmt: skip

ON_CUDA = [f for f in all_faults() if f.devices == ("cuda",)]
LARGE = [f for f in ON_CUDA if f.name.endswith("in_32_bits")]
TELLING = ("contract", "determinism", "graph_replay", "side_stream")  # the checks that see what only a GPU shows


def survives(fault: Any, checks: tuple[str, ...]) -> bool:
    """Whether every case of these checks passes the fault."""
    with Pool(fault.stage, fault.spec, "cuda", 1, 120.0) as pool:
        request = Request(device="cuda", dtypes=pool.start().dtypes)
        ids = (p.id for p in plan(fault.stage, request) if p.check in checks)
        return not any(answer.fails for answer in map(pool.judge_one, ids))


@pytest.mark.parametrize("fault", [f for f in ON_CUDA if f not in LARGE], ids=lambda fault: fault.name)
def test_the_judge_finds(fault: Any) -> None:
    assert not survives(fault, TELLING), f"{fault.name} survives; {fault.condition}"


def test_the_judge_finds_offsets_in_32_bits() -> None:
    """One after the other: each takes most of the device's memory."""
    assert [f.name for f in LARGE if survives(f, ("large_offsets",))] == []


def arguments(T: int = 7, H: int = 64, I: int = 32, E: int = 6, k: int = 3, seed: int = 0) -> list[Tensor]:  # noqa: E741
    random = torch.Generator("cuda").manual_seed(seed)
    made = {"generator": random, "device": "cuda"}
    x, gate_up = torch.randn(T, H, **made), torch.randn(E, 2 * I, H, **made) / H**0.5
    down, weights = torch.randn(E, H, I, **made) / I**0.5, torch.rand(T, k, **made)
    ids = torch.rand(T, E, **made).argsort(1)[:, :k].contiguous()
    return [x, gate_up, down, weights, ids]


def wrong(out: Tensor, args: list[Tensor], activation: str = "silu") -> bool:
    """Whether any element lies outside the judge's bound of an implementation that rounds nothing on the way."""
    bound = experts_bound(*args, activation=activation, expert_map=None, declared=())
    return bool(bound.z(out).abs().nan_to_num(nan=torch.inf).amax() > bounds.max_limit())


def captured(function: Callable[..., Tensor], args: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*args, activation="gelu_tanh")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*args, activation="gelu_tanh")
    return graph, out


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_graph_fault_shows_on_replay(name: str) -> None:
    function, args = get(name).function, arguments()
    assert not wrong(function(*args, activation="gelu_tanh"), args, activation="gelu_tanh")
    graph, out = captured(function, args)
    verdicts = []
    for seed in range(1, 4):
        for old, new in zip(args, arguments(seed=seed), strict=True):
            old.copy_(new)
        function(*arguments(T=9, seed=seed), activation="gelu_tanh")
        graph.replay()
        torch.cuda.synchronize()
        verdicts.append(wrong(out, args, activation="gelu_tanh"))
    assert any(verdicts)


def test_right_building_block_survives_replay() -> None:
    from moe_harness.harness.stages.experts.faults.cuda import run_captured

    args = arguments()
    graph, out = captured(run_captured, args)
    args[0].copy_(arguments(seed=1)[0])
    graph.replay()
    torch.cuda.synchronize()
    assert not wrong(out, args, activation="gelu_tanh")


def test_result_is_read_before_the_side_stream_is_done() -> None:
    args = arguments()
    out = get("side_stream_not_ordered").function(*args).clone()
    torch.cuda.synchronize()
    assert wrong(out, args)


def test_default_stream_is_not_the_callers() -> None:
    args = arguments()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        args[0].mul_(2)
        out = get("default_stream_always").function(*args).clone()
    torch.cuda.synchronize()
    assert wrong(out, args)


def test_atomics_differ_from_run_to_run() -> None:
    args = arguments(T=512, H=2048, E=32, k=8)
    function = get("index_add_in_order_of_arrival").function
    first = function(*args)
    assert any(not torch.equal(first, function(*args)) for _ in range(20))


def test_output_offset_wraps_beyond_two_to_the_31() -> None:
    args = arguments(T=(1 << 31) // (8 * 4096) + 2, H=4096, I=8, E=8, k=8)
    tail = [args[0][-2:], *args[1:3], args[3][-2:], args[4][-2:]]
    assert wrong(get("output_offset_in_32_bits").function(*args)[-2:], tail)
    assert not wrong(run(*args)[-2:], tail)


def test_weight_offset_wraps_beyond_two_to_the_31() -> None:
    args = arguments(T=4, H=4096, I=2048, E=130, k=8)
    args[4].clamp_(min=128)  # 128 * 4096 * 4096 = 2^31
    assert wrong(get("weight_offset_in_32_bits").function(*args), args)
    assert not wrong(run(*args), args)


def test_cpu_result_is_returned() -> None:
    assert get("returns_cpu_tensor").function(*arguments()).device.type == "cpu"


def test_synchronisation_ends_the_capture() -> None:
    with pytest.raises(RuntimeError):
        captured(get("declared_capturable_but_synchronises").function, arguments())
    with pytest.raises(RuntimeError, match="outside graph capture"):  # why the judge restores it
        torch.rand(1, device="cuda")
    restore_generator()
    torch.rand(1, device="cuda")
