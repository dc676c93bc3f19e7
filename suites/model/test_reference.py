"""The reference decoder against transformers' own models, on random small checkpoints of the released layout.

transformers loads the checkpoint from disk and runs it in fp32 and in bf16; the reference runs in fp64.  Where every
router's choice is the same the logits must agree within what rounding may do; most positions must remain.
"""

import json
from pathlib import Path

import pytest
import torch

from moe_harness.fixtures import checkpoints
from moe_harness.harness.core import bounds
from moe_harness.harness.stages.model.noise import logit_bound
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
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def reference(family: str, seed: int = 0, **changes: object) -> Model:
    keys = checkpoints.config(family, **changes)
    return Model(keys, checkpoints.tensors(keys, seed))


def prompt(batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def same_routing(found: tuple, model: Model, state: State) -> torch.Tensor:
    """Positions [B, L] at which every layer so far, of this and of all earlier positions, chose the same experts."""
    shape = prompt().shape
    same = torch.ones(shape, dtype=torch.bool)
    for logits, (layer, (_, _, ids)) in zip(found, state.routed.items(), strict=True):
        assert model.sparse(layer)
        k = ids.shape[-1]
        chosen = logits.double().topk(k, dim=-1).indices.sort(-1).values
        same &= (chosen == ids.sort(-1).values).all(-1).view(shape)
    return same.long().cumprod(-1).bool()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_reference_equals_transformers(variant: str, dtype: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    checkpoints.make(tmp_path, family, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPES[dtype])
    model, state = reference(family, **changes), State()
    model(prompt(), state)
    sparse = bool(state.routed)
    output = theirs(prompt(), **({"output_router_logits": True} if sparse else {}))
    bound = logit_bound(model, prompt(), DTYPES[dtype])
    judged = same_routing(output.router_logits, model, state) if sparse else torch.ones_like(prompt(), dtype=torch.bool)
    assert judged.double().mean() >= 0.5, f"only {int(judged.sum())} positions chose the same experts"
    z = bound.z(output.logits)[judged]
    assert z.abs().max() <= bounds.max_limit()
    assert z.square().mean().sqrt() <= bounds.rms_limit(int(judged.sum()))


@pytest.mark.parametrize("variant", ["qwen3_moe", "qwen2_moe", "qwen3"])
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


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}])
def test_models_that_it_does_not_know_are_refused(change: dict) -> None:
    keys = checkpoints.config("qwen3_moe") | change
    with pytest.raises(ValueError, match="but should be"):
        Model(keys, {})
