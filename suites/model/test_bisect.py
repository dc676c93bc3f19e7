"""Bisection: a fault in one layer is located there, in its half and by its name; the layers after it stay green."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_harness.fixtures import checkpoints
from moe_harness.harness.commands.app import app
from moe_harness.harness.core.contracts import load
from moe_harness.harness.stages.model.bisect import Location, bisect
from moe_harness.harness.stages.model.folder import reference_of
from moe_harness.suites.model import wrong_models
from moe_harness.suites.model.wrong_models import swap

LAYERS, WHERE = 4, 2
AT = f"model.layers.{WHERE}."


def at_the_layer(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def apply(held: dict) -> None:
        names = [name for name in held if name.startswith(AT) and part in name]
        assert names, part
        held.update({name: change(held[name]) for name in names})

    return apply


def swaps(first: str, second: str) -> Callable[[dict], None]:
    return lambda held: swap(held, AT + first, AT + second)


# Tensors of one layer changed, so that the model does there what the explanation says; the half that is wrong.
FAULTS: dict[str, tuple[Callable[[dict], None], str, str]] = {
    "norm weight": (at_the_layer("input_layernorm", torch.ones_like), "attention", "norm: its weight is taken as 1"),
    "gate and up": (swaps("mlp.experts.0.gate", "mlp.experts.0.up"), "mlp", ""),
    "all gates and ups": (
        lambda held: [swap(held, f"{AT}mlp.experts.{e}.gate", f"{AT}mlp.experts.{e}.up") for e in range(8)],
        "mlp", "experts: gate and up swapped",
    ),
    "experts": (swaps("mlp.experts.0.", "mlp.experts.1."), "mlp", "the first two swapped"),
    "q and k norm": (swaps("self_attn.q_norm", "self_attn.k_norm"), "attention", "norms swapped"),
    "o_proj lost": (at_the_layer("o_proj", torch.zeros_like), "attention", "o_proj: nothing is added"),
    "k and v": (swaps("self_attn.k_proj", "self_attn.v_proj"), "attention", "k and v swapped"),
    "router order": (at_the_layer("mlp.gate.weight", lambda w: w.roll(1, 0)), "mlp", "each is the one behind"),
    "one column lost": (at_the_layer("experts.5.down_proj", lambda w: w * (torch.arange(w.shape[1]) > 0)), "mlp", ""),
    "scaled values": (at_the_layer("v_proj", lambda w: w * 1.0625), "attention", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    folder = tmp_path_factory.mktemp("right")
    keys = checkpoints.config("qwen3_moe", num_hidden_layers=LAYERS)
    weights = checkpoints.tensors(keys, decisive=True)
    checkpoints.write(folder, keys, weights, 2)
    return folder, keys, weights


def located(folder: Path, suspect: Path, dtype: torch.dtype, spec: str = "qwen3_moe") -> Location:
    model = load("model", spec).function(str(suspect), device="cpu", dtype=dtype)
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(3))
    return bisect(model, reference_of(folder), ids, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["qwen3_moe", "transformers"])
def test_right_models_are_right_in_every_layer(folders: tuple, dtype: torch.dtype, spec: str) -> None:
    found = located(folders[0], folders[0], dtype, spec)
    assert found.first is None and len(found.layers) == LAYERS
    assert all(judged.share >= 0.5 and judged.worst > 0 for judged in found.layers)


@pytest.mark.parametrize("spec", ["qwen3_moe", "transformers"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_located_in_its_layer_and_half(fault: str, spec: str, folders: tuple, tmp_path: Path) -> None:
    folder, keys, weights = folders
    change, half, explained = FAULTS[fault]
    held = dict(weights)
    change(held)
    checkpoints.write(tmp_path, keys, held, 1)
    found = located(folder, tmp_path, torch.float32, spec)
    assert [judged.layer for judged in found.layers if judged.wrong] == [WHERE]
    assert [name for name, judged in found.halves.items() if judged.wrong] == [half]
    if explained:
        assert any(explained in what for what in found.explained), found.explained
    else:
        assert found.explained == []


@pytest.mark.parametrize(
    ("name", "explained"),
    [("never_renormalised", "router: renormalised"), ("one_expert_less", "one expert too few"),
     ("theta_ignored", None), ("gate_and_up_swapped", "gate and up swapped")],
)  # fmt: skip
def test_a_fault_of_every_layer_is_explained_in_the_first(
    name: str, explained: str | None, folders: tuple, tmp_path: Path
) -> None:
    folder, keys, weights = folders
    checkpoints.write(tmp_path, keys, weights, 1)
    model = getattr(wrong_models, name)(str(tmp_path), device="cpu", dtype=torch.float32)
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(3))
    found = bisect(model, reference_of(folder), ids, torch.float32, "cpu")
    assert found.first is not None and found.first.layer == 0
    assert all(judged.wrong for judged in found.layers)
    assert explained is None or any(explained in what for what in found.explained), found.explained


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    told = str(result.exception or "")
    return getattr(result.exception, "exit_status", result.exit_code), result.output + told


def test_the_command_tells_the_layer(folders: tuple) -> None:
    file = Path(wrong_models.__file__)
    code, out = call(
        "bisect", "--model", str(folders[0]), "--impl", f"{file}:one_layer_scaled", "--against", "qwen3_moe"
    )
    assert code == 1, out
    assert "layer 1 is the first wrong one" in out and "the layers after it are right" in out
    assert "qwen3_moe: every layer is right within rounding" in out
    assert call("bisect", "--model", str(folders[0]), "--impl", "qwen3_moe")[0] == 0


def test_a_wrong_call_of_bisect_says_what_to_do(folders: tuple, tmp_path: Path) -> None:
    right = ("--model", str(folders[0]), "--impl", "qwen3_moe")
    for arguments, message in {
        ("bisect", "--model", str(tmp_path), "--impl", "qwen3_moe"): "holds no config.json",
        ("bisect", *right, "--ids", "1,2", "--ids", "3"): "as many each",
        ("bisect", *right, "--ids", "1,999"): "from 0 to 127",
        ("bisect", *right, "--dtype", "int8"): "dtype",
        ("bisect", "--model", str(folders[0]), "--impl", "qwen4"): "qwen3_moe",
    }.items():
        code, out = call(*arguments)
        assert code == 2 and message in out, (arguments, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [("generate", "--ids", "1"), ("bisect", "--impl", "qwen3_moe")])
def test_a_gpu_that_is_not_there_is_told(command: tuple[str, ...], folders: tuple) -> None:
    code, out = call(*command, "--model", str(folders[0]), "--device", "cuda")
    assert code == 3 and "there is no CUDA device here" in out and "failed" not in out, out


def test_generate_continues_prompts(folders: tuple, tmp_path: Path) -> None:
    model, target = str(folders[0]), tmp_path / "out.json"
    common = ("generate", "--model", model, "--max-new-tokens", "6", "--ignore-eos", "--json", str(target))
    assert call(*common, "--ids", "1,2,3", "--ids", "7 8")[0] == 0
    together = json.loads(target.read_text())
    assert [len(tokens) for tokens in together["tokens"]] == [6, 6]
    assert together["tokens_per_second"] > 0
    for ids, tokens in zip(("1,2,3", "7,8"), together["tokens"], strict=True):
        code, out = call(*common, "--ids", ids)
        assert code == 0 and json.loads(target.read_text())["tokens"] == [tokens]
        assert " ".join(map(str, tokens)) in out
    assert call(*common, "--ids", "1,2,3", "--impl", "transformers")[0] == 0
    assert json.loads(target.read_text())["tokens"] == together["tokens"][:1]


def test_generate_says_what_is_wrong(folders: tuple, tmp_path: Path) -> None:
    model = ("generate", "--model", str(folders[0]))
    for arguments, message in {
        model: "give --prompt TEXT or --ids",
        (*model, "--prompt", "hello"): "holds no tokenizer",
        (*model, "--ids", "one"): "should be token ids",
        (*model, "--ids", "128"): "wanted ids in 0..127",
        (*model, "--ids", "1", "--max-new-tokens", "100000"): "wanted at most",
        (*model, "--ids", "1", "--impl", "qwen4"): "qwen3_moe",
        ("generate", "--model", str(tmp_path), "--ids", "1"): "got no config.json",
        ("generate", "--model", str(tmp_path / "absent"), "--prompt", "hello"): "there is no folder",
    }.items():
        code, out = call(*arguments)
        assert code == 2 and message in out, (arguments, out)


@pytest.mark.parametrize(
    ("change", "half", "layer", "explained"),
    [
        ({"topk_method": "greedy"}, "mlp", 1, "mlp: router: the limit of groups ignored"),
        ({"routed_scaling_factor": 1.0}, "mlp", 1, "mlp: router: routed_scaling_factor left out"),
        ({"rope_scaling": None}, "attention", 0, "attention: rope: yarn's scaling left out"),
    ],
)
def test_what_deepseek_does_otherwise_is_explained(
    change: dict, half: str, layer: int, explained: str, tmp_path: Path
) -> None:
    keys = checkpoints.config("deepseek_v2")
    weights = checkpoints.tensors(keys, decisive=True)
    checkpoints.write(tmp_path / "right", keys, weights, 1)
    checkpoints.write(tmp_path / "suspect", keys | change, weights, 1)
    found = located(tmp_path / "right", tmp_path / "suspect", torch.float32)
    assert found.first is not None and found.first.layer == layer
    assert [name for name, judged in found.halves.items() if judged.wrong] == [half]
    assert explained in found.explained
