"""The bench times what is right only: its judgement on CPU tensors, and the whole of it on a GPU."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_harness.fixtures.configs import shape
from moe_harness.harness.bench import timing as bench
from moe_harness.harness.bench.data import Draw, TimedBatch, TimedLayer, problem
from moe_harness.harness.core.catalogue import get
from moe_harness.harness.core.contracts import Subject, load
from moe_harness.harness.core.registry import needed_part, stages_with
from moe_harness.harness.stages.experts.faults.cuda import run_captured

SMALL = {"hidden_size": 48, "intermediate_size": 32}
LAYER = TimedLayer(replace(shape("qwen3-30b-a3b"), num_experts=12, top_k=3, **SMALL))
SIGMOID = TimedLayer(replace(shape("deepseek-v3"), num_experts=16, num_expert_group=4, topk_group=2, top_k=3, **SMALL))
RIGHT = {"quantized_experts": "torch:dequantized"}
FAULTS = {
    "experts": ("gate_up_swapped", "activation_dropped"),
    "router": ("never_renormalised", "ids_sorted_alone"),
    "grouped_linear": ("expert_of_first_row_in_block",),
    "shared_expert_gate": ("sigmoid_dropped", "gate_of_first_token"),
}


def batch_of(stage: str, layer: TimedLayer = LAYER, tokens: int = 21) -> TimedBatch:
    draw = Draw(0, "cpu")
    part = needed_part(stage, "bench")
    weights = getattr(part, "weights", TimedLayer.weights)(layer, torch.bfloat16, draw)
    return part.batch(layer, tokens, torch.bfloat16, weights, draw)


def told(subject: Subject, batch: TimedBatch) -> str:
    return problem(subject, batch, [subject.call(args, keywords) for args, keywords in batch.calls])


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("stage", stages_with("bench"))
def test_right_results_are_timed(stage: str, tokens: int) -> None:
    assert told(load(stage, RIGHT.get(stage, "torch:loop")), batch_of(stage, tokens=tokens)) == ""


@pytest.mark.parametrize("format", ["fp8_block", "int8_channel", "int4_group", "mxfp4"])
def test_quantised_weights_are_judged_as_their_format_has_them_and_cost_the_bytes_that_they_have(format: str) -> None:
    model = replace(shape("gpt-oss-20b"), num_experts=4, top_k=4, hidden_size=256, intermediate_size=128)
    batch = batch_of("quantized_experts", TimedLayer(model, format=format), tokens=9)
    assert told(load("quantized_experts", "torch:dequantized"), batch) == ""
    assert "is wrong" in told(load("quantized_experts", get("gate_up_bias_dropped").spec), batch)
    elements, rows = 4 * 3 * 256 * 128, 2 * 9 * 256 * 2
    per_element = {"fp8_block": 1 + 4 / 128**2, "int4_group": 0.5 + 2 / 128, "mxfp4": 0.5 + 1 / 32}
    scales = 4 * 4 * (256 + 256) if format == "int8_channel" else 0
    assert batch.bytes == elements * per_element.get(format, 1) + scales + rows
    assert batch.fp8 == (format == "fp8_block")


def costs(batch: TimedBatch) -> tuple[float, float]:
    """Bytes and operations of a batch, from the tensors of its first call."""
    args = batch.calls[0][0]
    size = sum(tensor.nbytes for tensor in args.values() if tensor.is_floating_point())
    if batch.stage == "router":
        return size + args["router_logits"].shape[0] * 3 * (4 + 8), 0.0
    if batch.stage == "shared_expert_gate":
        return size + args["shared_output"].nbytes, 0.0
    if batch.stage == "grouped_linear":
        rows, touched = len(args["x"]), int((args["group_sizes"] > 0).sum())
        one = args["weight"][0]
        return args["x"].nbytes + touched * one.nbytes + rows * len(one) * 2, 2.0 * rows * one.numel()
    local, ids = len(args["gate_up_proj"]), args["topk_ids"]
    up, down, here = args["gate_up_proj"][0], args["down_proj"][0], ids[ids < local]
    size = len(here.unique()) * (up.nbytes + down.nbytes) + 2 * args["hidden_states"].nbytes
    return size, 2.0 * len(here) * (up.numel() + down.numel())


@pytest.mark.parametrize("stage", ["router", "shared_expert_gate", "grouped_linear", "experts"])
@pytest.mark.parametrize("layer", [LAYER, replace(LAYER, ep_size=4)], ids=["whole", "a rank's"])
def test_bytes_and_operations_are_those_of_the_tensors(stage: str, layer: TimedLayer) -> None:
    """Of the weights those of experts that have tokens: the floor and the share of the device's speed rest on them."""
    for tokens in (2, 21):
        batch = batch_of(stage, layer, tokens)
        assert (batch.bytes, batch.flops) == costs(batch)


def test_one_rank_of_many_and_sigmoid_with_groups_are_judged_by_their_own_rule() -> None:
    assert told(load("experts", "torch:loop"), batch_of("experts", replace(LAYER, ep_size=4))) == ""
    assert told(load("router", "torch:loop"), batch_of("router", SIGMOID)) == ""
    assert batch_of("router", SIGMOID).calls[0][1]["scoring"] == "sigmoid"


@pytest.mark.parametrize(("stage", "name"), [(s, n) for s, names in FAULTS.items() for n in names])
def test_a_wrong_result_is_not_timed(stage: str, name: str) -> None:
    assert "is wrong" in told(load(stage, get(name).spec), batch_of(stage))


def spoiled(which: int, change: Callable[[Any], Any]) -> str:
    """What is said where the result of one call is changed."""
    subject, batch = load("experts", "torch:loop"), batch_of("experts")
    results = [subject.call(args, keywords) for args, keywords in batch.calls]
    results[which] = change(results[which])
    return problem(subject, batch, results)


def test_every_set_of_weights_is_judged() -> None:
    assert spoiled(1, lambda out: out) == ""
    assert "sigma from the reference" in spoiled(1, lambda out: out * 1.5)


def test_a_poisoned_or_misshapen_result_is_not_timed() -> None:
    assert "inf sigma" in spoiled(0, lambda out: torch.full_like(out, float("nan")))
    assert "returned shapes" in spoiled(0, lambda out: out[1:])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--stage", "expert"], 2, "did you mean 'experts'"),
        (["--stage", "experts", "--config", "qwen3-30b"], 2, "did you mean 'qwen3-30b-a3b'"),
        (["--stage", "experts", "--tokens", "8,x"], 2, "positive numbers such as 1,64,1024"),
        (["--stage", "experts", "--dtype", "int8"], 2, "known: bf16, fp16, fp32"),
        (["--stage", "experts", "--format", "mxfp4"], 2, "has weights of one kind only"),
        (["--stage", "quantized_experts", "--format", "mxfp8"], 2, "did you mean 'mxfp4'"),
        (["--stage", "experts", "--ep-size", "3"], 2, "should divide the model's 128 experts"),
        (["--stage", "experts", "--json", "/nowhere/x.json"], 2, "its folder does not exist"),
    ],
)
def test_wrong_calls_say_what_to_do(arguments: list[str], status: int, message: str) -> None:
    done = command(*arguments)
    assert (done.returncode, message in done.stderr) == (status, True), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_nothing_is_timed() -> None:
    done = command("--stage", "experts")
    assert (done.returncode, done.stderr) == (
        3, "moe-harness: nothing was timed: there is no CUDA device to time on\n"
    )  # fmt: skip


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "moe_harness", "bench", "--impl", "torch:loop", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.gpu
def test_on_a_gpu_the_wrong_one_is_refused_and_the_right_one_timed(tmp_path: Path) -> None:
    """One of the wrong ones is right when it is called and wrong when it is replayed; the right one waits for the
    device, so that it cannot be captured, and PyTorch's random numbers outlive that."""
    specs = ["torch:loop", f"{__file__}:wrong_when_replayed", get("gate_up_swapped").spec]
    layer = TimedLayer(replace(LAYER.model, hidden_size=256))
    report = bench.bench("experts", specs, layer, [1, 33], rounds=3)
    (tmp_path / "report.json").write_text(report.as_json())
    assert bench.BenchReport.read(tmp_path / "report.json") == report
    for timing in report.timings:
        assert timing.floor >= report.launch > 0
        if timing.spec == "torch:loop":
            assert 0 < timing.low <= timing.median <= timing.high
            assert timing.called == timing.median, "what cannot be captured is timed as it is called"
        else:
            assert "is wrong" in timing.refused and timing.median == 0
    torch.rand(1, device="cuda")


@pytest.mark.gpu
def test_one_that_fills_the_memory_is_refused_and_the_others_timed() -> None:
    spec = f"{__file__}:greedy"
    report = bench.bench("experts", [spec, "torch:loop"], LAYER, [5], rounds=3)
    assert "OutOfMemoryError" in report.timings[0].refused
    assert report.timings[1].median > 0


def wrong_when_replayed(*operands: torch.Tensor, **options: Any) -> torch.Tensor:
    """Under capture it takes another path."""
    return run_captured(*operands, **options) * (2 if torch.cuda.is_current_stream_capturing() else 1)


def greedy(hidden_states: torch.Tensor, *operands: torch.Tensor, **options: Any) -> torch.Tensor:
    """Takes more memory than any device has."""
    return torch.empty(1 << 45, device=hidden_states.device)
