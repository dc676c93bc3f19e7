"""The reference decoder against transformers' own models, on random small checkpoints of the released layout.

transformers loads the checkpoint from disk and runs it in fp32 and in bf16; the reference runs in fp64.  Where every
router's choice is the same the logits must agree within what rounding may do; most positions must remain.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.noise import logit_bound
from moe_harness.reference.layers import rotate_halves
from moe_harness.reference.model import Model, State

transformers = pytest.importorskip("transformers")

VARIANTS = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_not_renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe_tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen3_moe_dense_layers": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "qwen3_moe_every_second": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3_moe_bias": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe_theta": ("qwen3_moe", {"rope_theta": 1e6, "rms_norm_eps": 1e-3}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe_renormalised": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen3": ("qwen3", {}),
    "talker": ("qwen3_omni_moe_talker_text", {}),
    "qwen3_next": ("qwen3_next", {}),
    "deepseek_v2_lite": ("deepseek_v2_lite", {}),
    "deepseek_v2_lite_yarn_mscale": (
        "deepseek_v2_lite",
        {"rope_scaling": checkpoints.YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, "first_k_dense_replace": 0},
    ),
    "deepseek_v2_groups": ("deepseek_v2", {}),
}


def reference(family: str, seed: int = 0, **changes: object) -> Model:
    keys = checkpoints.config(family, **changes)
    return Model(keys, checkpoints.tensors(keys, seed))


def prompt(batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def same_routing(chosen: dict[int, torch.Tensor], state: State) -> torch.Tensor:
    """Positions [B, L] at which every layer so far, of this and of all earlier positions, chose the same experts."""
    assert set(chosen) == set(state.routed), "other layers have experts"
    same = torch.ones(prompt().shape, dtype=torch.bool)
    for layer, (_, _, ids) in state.routed.items():
        same &= (chosen[layer].sort(-1).values == ids.sort(-1).values).all(-1).view(same.shape)
    return same.long().cumprod(-1).bool()


def theirs(folder: Path, family: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits of transformers' model over the folder, and the experts that each layer chose."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = talker(folder, dtype) if "talker" in family else load(folder, dtype=dtype)
    chosen: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            layer = int(name.split("layers.")[1].split(".")[0])
            module.register_forward_hook(lambda _, given, out, layer=layer: chosen.update({layer: out[2]}))
    return model(prompt()).logits, chosen


class Talker(torch.nn.Module):
    """transformers has no class of the talker's decoder with its head alone."""

    def __init__(self, config: object, dtype: torch.dtype):
        super().__init__()
        from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as theirs

        self.model = theirs.Qwen3OmniMoeTalkerModel._from_config(config, dtype=dtype)
        self.codec_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        embedded = self.model.get_input_embeddings()(ids)
        return SimpleNamespace(logits=self.codec_head(self.model(inputs_embeds=embedded).last_hidden_state))


def talker(folder: Path, dtype: torch.dtype) -> Talker:
    from safetensors.torch import load_file
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig

    config = Qwen3OmniMoeTalkerTextConfig(**json.loads((folder / "config.json").read_text()))
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    held = {name.removeprefix("talker."): tensor.to(dtype) for name, tensor in held.items()}
    for i in range(config.num_hidden_layers):
        experts = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            torch.stack([held.pop(f"{experts}.{e}.{part}_proj.weight") for e in range(config.num_experts)])
            for part in ("gate", "up", "down")
        )
        held |= {f"{experts}.gate_up_proj": torch.cat((gate, up), dim=1), f"{experts}.down_proj": down}
    model = Talker(config, dtype)
    model.load_state_dict(held, strict=True)
    return model.eval()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_reference_equals_transformers(variant: str, dtype: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    checkpoints.make(tmp_path, family, **changes)
    logits, chosen = theirs(tmp_path, family, bounds.DTYPES[dtype])
    model, state = reference(family, **changes), State()
    model(prompt(), state)
    bound = logit_bound(model, prompt(), bounds.DTYPES[dtype])
    judged = same_routing(chosen, state)
    assert judged.double().mean() >= 0.5, f"only {int(judged.sum())} positions chose the same experts"
    z = bound.z(logits)[judged]
    assert z.abs().max() <= bounds.max_limit()
    assert z.square().mean().sqrt() <= bounds.rms_limit(int(judged.sum()))


@pytest.mark.parametrize("variant", ["qwen3_moe", "qwen2_moe", "qwen3", "qwen3_next", "deepseek_v2"])
@torch.no_grad()
def test_keys_kept_from_before_change_nothing(variant: str) -> None:
    """One call over all positions equals one call per part, in fp64."""
    model = reference(variant)
    whole, state = model(prompt()), State()
    parts = torch.cat([model(part, state) for part in prompt().split([4, 1, 6], dim=1)], dim=1)
    assert (whole - parts).abs().max() <= bounds.SAME_IN_FP64 * whole.abs().max()


@torch.no_grad()
def test_forced_routing_of_its_own_choice_changes_nothing() -> None:
    model, state = reference("qwen3_moe"), State()
    free = model(prompt(), state)
    forced = {layer: (weights, ids) for layer, (_, weights, ids) in state.routed.items()}
    assert torch.equal(model(prompt(), State(forced=forced)), free)
    other = {layer: (weights, (ids + 1) % 8) for layer, (weights, ids) in forced.items()}
    assert not torch.equal(model(prompt(), State(forced=other)), free)


def swapped(weights: dict, first: str, second: str) -> dict:
    rename = {first: second, second: first}
    return {next((k.replace(a, b) for a, b in rename.items() if a in k), k): w for k, w in weights.items()}


WRONG = {
    "gate and up swapped": lambda keys, w: (keys, swapped(w, ".gate_proj.", ".up_proj.")),
    "not renormalised": lambda keys, w: (keys | {"norm_topk_prob": False}, w),
    "another theta": lambda keys, w: (keys | {"rope_theta": 1e6}, w),
    "another epsilon": lambda keys, w: (keys | {"rms_norm_eps": 1e-2}, w),
    "q and k norm swapped": lambda keys, w: (keys, swapped(w, ".q_norm.", ".k_norm.")),
    "q norm missing": lambda keys, w: (keys, {k: v for k, v in w.items() if "q_norm" not in k and "k_norm" not in k}),
    "one expert less": lambda keys, w: (keys | {"num_experts_per_tok": 1}, w),
    "norms swapped": lambda keys, w: (keys, swapped(w, "input_layernorm", "post_attention_layernorm")),
    "head tied": lambda keys, w: (keys | {"tie_word_embeddings": True}, w),
}


@pytest.mark.parametrize("fault", WRONG)
@torch.no_grad()
def test_the_comparison_sees_a_wrong_model(fault: str, tmp_path: Path) -> None:
    checkpoints.make(tmp_path, "qwen3_moe")
    keys = json.loads((tmp_path / "config.json").read_text())
    right = Model(keys, checkpoints.tensors(keys))
    wrong = Model(*WRONG[fault](keys, dict(right.weights)))
    bound = logit_bound(right, prompt(), torch.bfloat16)
    assert bound.z(wrong(prompt())).abs().max() > bounds.max_limit()


def doubled(part: str) -> Callable[[dict, dict], tuple[dict, dict]]:
    return lambda keys, w: (keys, {name: 2 * tensor if part in name else tensor for name, tensor in w.items()})


def ones(part: str) -> Callable[[dict, dict], tuple[dict, dict]]:
    return lambda keys, w: (keys, {name: torch.ones_like(t) if part in name else t for name, t in w.items()})


def keys(**changes: object) -> Callable[[dict, dict], tuple[dict, dict]]:
    return lambda keys, w: (keys | changes, w)


WRONG_IN = {
    ("deepseek_v2", "group limit ignored"): keys(topk_method="greedy"),
    ("deepseek_v2", "routed scale forgotten"): keys(routed_scaling_factor=1.0),
    ("deepseek_v2", "norm of the query's low rank"): ones("q_a_layernorm"),
    ("deepseek_v2_lite", "norm of the latent"): ones("kv_a_layernorm"),
    ("deepseek_v2_lite", "angles not scaled"): keys(rope_scaling=None),
    ("deepseek_v2_lite", "softmax without yarn's sharpness"): keys(
        rope_scaling=checkpoints.YARN | {"mscale_all_dim": 0, "mscale": 0, "attention_factor": 1.0}
    ),
    ("deepseek_v2_lite", "shared experts twice"): doubled("shared_experts.down_proj"),
    ("qwen3_omni_moe_talker_text", "shared expert twice"): doubled("shared_expert.down_proj"),
    ("qwen3_omni_moe_talker_text", "gate of the shared expert"): doubled("shared_expert_gate"),
    ("qwen3_next", "whole heads turned"): keys(partial_rotary_factor=1.0),
    ("qwen3_next", "memory that does not fade"): lambda keys, w: (
        keys, {name: t - 30 if "A_log" in name else t for name, t in w.items()}),
    ("qwen3_next", "no bias of the fading"): lambda keys, w: (
        keys, {name: 0 * t if "dt_bias" in name else t for name, t in w.items()}),
    ("qwen3_next", "convolution the other way round"): lambda keys, w: (
        keys, {name: t.flip(-1) if "conv1d" in name else t for name, t in w.items()}),
    ("qwen3_next", "norm behind linear attention"): ones("linear_attn.norm"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "fault"), WRONG_IN)
@torch.no_grad()
def test_the_comparison_sees_what_a_family_does_otherwise(family: str, fault: str) -> None:
    right = reference(family)
    wrong = Model(*WRONG_IN[family, fault](dict(right.config), dict(right.weights)))
    assert logit_bound(right, prompt(), torch.bfloat16).z(wrong(prompt())).abs().max() > bounds.max_limit()


@torch.no_grad()
def test_the_comparison_sees_halves_turned_for_neighbours() -> None:
    model = reference("deepseek_v2_lite")
    bound = logit_bound(model, prompt(), torch.bfloat16)
    model.attend.rotate = rotate_halves
    assert bound.z(model(prompt())).abs().max() > bounds.max_limit()


@torch.no_grad()
def test_the_talker_is_found_in_a_whole_omni() -> None:
    """Its config lies in talker_config, and tensors of the thinker are not its own."""
    alone = reference("qwen3_omni_moe_talker_text")
    whole = {"model_type": "qwen3_omni_moe", "talker_config": {"text_config": dict(alone.config)}}
    held = checkpoints.tensors(alone.config) | {"thinker.model.norm.weight": torch.zeros(1)}
    model = Model(whole, held | {"talker.code_predictor.model.norm.weight": torch.zeros(1)})
    assert "model.embed_tokens.weight" in model.weights
    assert not any("thinker" in name or "predictor" in name for name in model.weights)
    assert torch.equal(model(prompt()), alone(prompt()))


@pytest.mark.parametrize("change", [{"mlp_bias": True}, {"moe_layer_freq": 2}, {"scoring_func": "sigmoid"},
                                    {"rope_scaling": {"type": "linear", "factor": 2.0}}])  # fmt: skip
def test_what_no_released_deepseek_v2_has_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="but should be"):
        Model(checkpoints.config("deepseek_v2") | change, {})


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}])
def test_models_that_it_does_not_know_are_refused(change: dict) -> None:
    keys = checkpoints.config("qwen3_moe") | change
    with pytest.raises(ValueError, match="but should be"):
        Model(keys, {})
