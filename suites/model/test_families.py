"""The engine over families that are not Qwen3-MoE's own: latent attention in pages, the talker, shares of ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from moe_harness.fixtures import checkpoints
from moe_harness.harness.commands.app import app
from moe_harness.harness.core import bounds
from moe_harness.harness.core.errors import UsageError
from moe_harness.impls.qwen3_moe.config import CheckpointError, Config
from moe_harness.impls.qwen3_moe.loader import load
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.qwen3_moe.weights import Layout
from moe_harness.reference.model import Model as Reference

TALKER = "qwen3_omni_moe_talker_text"
SMALL = {"pages": 40, "page_size": 4, "max_sequences": 3, "max_tokens": 8, "max_length": 60}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v2_lite", TALKER])
@torch.no_grad()
def test_tokens_are_the_references(family: str, tmp_path: Path) -> None:
    """In fp64, over chunks, pages, more prompts than run at once, and a prefix that was computed before."""
    checkpoints.make(tmp_path, family)
    keys = checkpoints.config(family)
    model, reference = loaded(tmp_path), Reference(keys, checkpoints.tensors(keys))
    row = torch.randint(0, 128, (23,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [row[:3], row[:13], row, row[5:6], row[:16]]
    for prompt, tokens in zip(prompts, model.generate(prompts, max_new_tokens=5, ignore_eos=True), strict=True):
        logits = reference(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(-1).tolist()
    assert model.engine.scheduler.found_tokens > 0
    model.engine.check()


def loaded(folder: Path, dtype: torch.dtype = torch.float64, **options: object) -> Model:
    return load_model(folder, device="cpu", dtype=dtype, **SMALL | options)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v2_lite", TALKER])
@torch.no_grad()
def test_shares_of_ranks_add_up(family: str, tmp_path: Path) -> None:
    """Of two ranks each gives a part of attention and of the mlps; the parts are the whole, nothing counts twice."""
    checkpoints.make(tmp_path, family)
    config = Config.read(tmp_path)
    x = torch.randn(1, 5, config.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(config.layers):
        for half in ("attention", "mlp"):
            whole, *parts = (share(tmp_path, config, *place).half(i, half, x) - x for place in ((0, 1), (0, 2), (1, 2)))
            assert (sum(parts) - whole).abs().max() <= bounds.SAME_IN_FP64 * whole.abs().max(), (i, half)


def share(folder: Path, config: Config, rank: int, ranks: int) -> Model:
    layout = Layout(config, rank, ranks)
    parameters = layout.empty(torch.float64, "cpu")
    load(folder, layout, parameters)
    return Model(layout, parameters, torch.device("cpu"), torch.float64)


def test_a_page_of_latents_is_small(tmp_path: Path) -> None:
    """R + D_rope numbers of a token and layer, whatever the number of heads."""
    checkpoints.make(tmp_path, "deepseek_v2")
    model = loaded(tmp_path)
    numbers = 40 * 4 * 2 * (32 + 8)  # pages * tokens * layers * kept
    assert numbers <= model.engine.runner.cache.storage.numel() <= numbers * 41 / 40


@torch.no_grad()
def test_the_talker_is_run_from_a_whole_omni(tmp_path: Path) -> None:
    checkpoints.make(tmp_path / "alone", TALKER)
    keys = checkpoints.config(TALKER)
    text = {key: value for key, value in keys.items() if key != "eos_token_id"}
    whole = {"model_type": "qwen3_omni_moe", "talker_config": {"text_config": text, "codec_eos_token_id": 7}}
    other = {name: torch.zeros(2) for name in ("thinker.model.norm.weight", "talker.text_projection.linear_fc1.bias")}
    checkpoints.write(tmp_path / "whole", whole, checkpoints.tensors(keys) | other, 2)
    (tmp_path / "whole" / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    model = loaded(tmp_path / "whole")
    assert model.config.stop_ids == {7}
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids), loaded(tmp_path / "alone")(ids))


def config_of(**changes: object) -> Callable[[dict, dict[str, Tensor]], None]:
    return lambda keys, held: keys.update(changes)


GATE = "model.layers.1.mlp.gate.weight"


def without(key: str) -> Callable[[dict, dict[str, Tensor]], object]:
    return lambda keys, held: held.pop(key)


V2, LITE = "deepseek_v2", "deepseek_v2_lite"
GATE = "model.layers.1.mlp.gate.weight"
GATE_OF_SHARED = "talker.model.layers.0.mlp.shared_expert_gate.weight"
WRONG: dict[str, tuple[str, Callable[[dict, dict[str, Tensor]], object], str]] = {
    "dense layer read as sparse": (V2, config_of(first_k_dense_replace=0), r"layers.0.mlp.*is left over"),
    "sparse layer read as dense": (V2, config_of(first_k_dense_replace=2), r"layers.1.mlp.*is left over"),
    "layers of nonsense": (V2, config_of(first_k_dense_replace=9), "is 9, wanted a whole number from 0 to 2"),
    "another rank": (V2, config_of(kv_lora_rank=16), r"shape \[40, 64\], wanted \[24, 64\]"),
    "no low rank of queries": (V2, config_of(q_lora_rank=None), "q_a_layernorm.weight is left over"),
    "groups do not divide": (V2, config_of(n_group=3), "n_group is 3, wanted a divisor of the 8 experts"),
    "too few in the groups": (V2, config_of(topk_group=1), "topk_group is 1, wanted at most 4 groups, with 3"),
    "unknown method": (V2, config_of(topk_method="noaux_tc"), "topk_method is 'noaux_tc', wanted one of greedy"),
    "sigmoid": (V2, config_of(scoring_func="sigmoid"), "scoring_func is 'sigmoid', wanted one of softmax"),
    "another scaling": (V2, config_of(rope_scaling={"type": "linear"}), "rope_scaling is 'linear', wanted no"),
    "yarn without a factor": (V2, config_of(rope_scaling={"type": "yarn"}), "wanted factor and original_max"),
    "a shared expert too few": (LITE, config_of(n_shared_experts=1), r"shared_experts.*wanted \[32, 64\]"),
    "biases": (V2, config_of(attention_bias=True), "attention_bias is True, wanted False"),
    "gate missing": (V2, without(GATE), f"{GATE} missing"),
    "gate of the shared expert missing": (TALKER, without(GATE_OF_SHARED), f"{GATE_OF_SHARED} missing"),
    "left over": (TALKER, lambda keys, held: held.update({"talker.model.x": torch.zeros(1)}), "x is left over"),
    "an omni without a talker": (TALKER, config_of(model_type="qwen3_omni_moe"), "talker_config is None, wanted an"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_checkpoint_is_refused_with_its_reason(fault: str, tmp_path: Path) -> None:
    family, change, message = WRONG[fault]
    keys = checkpoints.config(family)
    held = checkpoints.tensors(keys)
    change(keys, held)
    checkpoints.write(tmp_path, keys, held, 2)
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("family", [V2, LITE, TALKER])
def test_the_command_continues_ids(family: str, tmp_path: Path) -> None:
    checkpoints.make(tmp_path, family, max_position_embeddings=64)
    if family == TALKER:
        (tmp_path / "tokenizer.json").write_text("{}")  # the thinker's, in a whole Omni
    told = CliRunner().invoke(
        app, ["generate", "-m", str(tmp_path), "--ids", "5,6,7", "--max-new-tokens", "3", "--ignore-eos"]
    )
    assert told.exit_code == 0, told.output
    wanted = loaded(tmp_path, torch.bfloat16).generate([[5, 6, 7]], max_new_tokens=3, ignore_eos=True)[0]
    assert " ".join(map(str, wanted)) in told.output


def test_the_talker_takes_no_text(tmp_path: Path) -> None:
    checkpoints.make(tmp_path, TALKER)
    (tmp_path / "tokenizer.json").write_text("{}")
    told = CliRunner().invoke(app, ["generate", "-m", str(tmp_path), "--prompt", "hello"])
    assert isinstance(told.exception, UsageError) and "give ids with --ids" in str(told.exception)
