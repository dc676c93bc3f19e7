"""Models that are wrong in one thing: each is our engine over a changed folder, or behind a changed call."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moe_harness.impls.qwen3_moe.latent import LatentAttention
from moe_harness.impls.qwen3_moe.model import Model, load_model
from moe_harness.impls.transformers.model import model as transformers_model

SMALL = {"pages": 128, "page_size": 4, "max_sequences": 8, "max_tokens": 16, "max_length": 270}


def right(model_dir: str, *, device: str, dtype: torch.dtype) -> Model:
    return load_model(model_dir, device=device, dtype=dtype, **SMALL)


def nothing(
    model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False
) -> Any:
    return object()


def over(change: Callable[[dict, dict], Any], then: Callable[..., Any] = right) -> Callable[..., Any]:
    """Loads with `then` after `change` of config and tensors."""

    def load(model_dir: str, *, device: str, dtype: torch.dtype) -> Any:
        file = Path(model_dir, "config.json")
        keys = json.loads(file.read_text())
        held = {}
        for shard in Path(model_dir).glob("*.safetensors"):
            held |= load_file(shard)
            shard.unlink()
        change(keys, held)
        file.write_text(json.dumps(keys))
        Path(model_dir, "model.safetensors.index.json").unlink(missing_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, Path(model_dir, "model.safetensors"))
        return then(model_dir, device=device, dtype=dtype)

    return load


def swap(held: dict, first: str, second: str) -> None:
    for name in [name for name in held if first in name]:
        other = name.replace(first, second)
        held[name], held[other] = held[other], held[name]


def calls(**methods: Callable[..., Any]) -> Callable[..., Model]:
    """Loads as it should, then answers through other methods."""

    def load(model_dir: str, *, device: str, dtype: torch.dtype) -> Any:
        model = right(model_dir, device=device, dtype=dtype)
        changed = type("Changed", (Model,), methods)
        model.__class__ = changed
        return model

    return load


def without_the_first(self: Model, prompts: list, **options: Any) -> list:
    return Model.generate(self, [prompt[1:] or prompt for prompt in prompts], **options)


def of_the_longest_shape(self: Model, prompts: list, **options: Any) -> list:
    longest = max(map(len, prompts))
    return Model.generate(self, [[0] * (longest - len(p)) + list(p) for p in prompts], **options)


def sampled(self: Model, prompts: list, **options: Any) -> list:
    return Model.generate(self, prompts, **options | {"temperature": 1.0})


def one_short(self: Model, prompts: list, **options: Any) -> list:
    return [tokens[:-1] for tokens in Model.generate(self, prompts, **options)]


def not_causal(self: Model, ids: torch.Tensor) -> torch.Tensor:
    return Model.__call__(self, ids.flip(1)).flip(1)


def drifting_layer(self: Model, i: int, hidden: torch.Tensor) -> torch.Tensor:
    out = Model.layer(self, i, hidden)
    return out * (1 + 2**-5) if i == 1 else out


gate_and_up_swapped = over(lambda keys, held: swap(held, ".gate_proj.", ".up_proj."))
norms_swapped = over(lambda keys, held: swap(held, ".input_layernorm.", ".post_attention_layernorm."))
key_norm_for_query_norm = over(lambda keys, held: swap(held, ".q_norm.", ".k_norm."))
theta_ignored = over(lambda keys, held: keys.update(rope_theta=keys["rope_theta"] * 50))
epsilon_too_large = over(lambda keys, held: keys.update(rms_norm_eps=5e-2))
never_renormalised = over(lambda keys, held: keys.update(norm_topk_prob=not keys["norm_topk_prob"]))
one_expert_less = over(lambda keys, held: keys.update(num_experts_per_tok=1))
experts_shifted = over(lambda keys, held: swap(held, ".experts.0.", ".experts.1."))
last_layer_lost = over(lambda keys, held: held.update({"model.layers.1.self_attn.o_proj.weight": torch.zeros_like(
    held["model.layers.1.self_attn.o_proj.weight"])}))  # fmt: skip
first_prompt_token_lost = calls(generate=without_the_first)
padded_without_a_mask = calls(generate=of_the_longest_shape)
not_greedy = calls(generate=sampled)
one_token_short = calls(generate=one_short)
backwards = calls(__call__=not_causal)
one_layer_scaled = calls(layer=drifting_layer)


def latent(**methods: Callable[..., Any]) -> Callable[..., Model]:
    """Loads as it should, then attends through other methods."""

    def load(model_dir: str, *, device: str, dtype: torch.dtype) -> Any:
        model = right(model_dir, device=device, dtype=dtype)
        attention = model.network.latent
        assert attention is not None
        attention.__class__ = type("Changed", (LatentAttention,), methods)
        return model

    return load


def reads(**changes: Any) -> Callable[..., Model]:
    """Loads as it should, then believes another config."""

    def load(model_dir: str, *, device: str, dtype: torch.dtype) -> Any:
        model = right(model_dir, device=device, dtype=dtype)
        model.network.config = replace(model.network.config, **changes)
        return model

    return load


def scaled(held: dict, part: str, by: float) -> None:
    for name in held:
        if part in name:
            held[name] = held[name] * by


def halves(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def without_norm_of_the_latent(self: LatentAttention, x: torch.Tensor, name: str) -> torch.Tensor:
    return x if name.endswith("kv_a_layernorm") else LatentAttention.norm(self, x, name)


def blunt(self: LatentAttention, cache: torch.Tensor) -> Callable[..., torch.Tensor]:
    self.scale = self.sizes.query**-0.5
    return LatentAttention._attend(self, cache)


def flipped_key(self: LatentAttention, name: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, normed, k_rope = LatentAttention._projected(self, name, x)
    return q, normed, k_rope.flip(-1)


halves_turned = latent(turned=staticmethod(halves))
latent_not_normed = latent(norm=without_norm_of_the_latent)
yarn_not_sharp = latent(_attend=blunt)
key_parts_in_another_order = latent(_projected=flipped_key)
angles_not_scaled = over(lambda keys, held: keys.update(rope_scaling=None))
group_limit_ignored = over(lambda keys, held: keys.update(topk_method="greedy"))
routed_scale_forgotten = over(lambda keys, held: keys.update(routed_scaling_factor=1.0))
weights_renormalised = reads(renormalize=True)
shared_expert_twice = over(lambda keys, held: scaled(held, "shared_experts.down_proj", 2.0))
shared_expert_twice_behind_its_gate = over(lambda keys, held: scaled(held, "shared_expert.down_proj", 2.0))
shared_expert_ungated = reads(shared_gate=False)
gate_half_open = over(lambda keys, held: scaled(held, "shared_expert_gate", 0.0))
memory_does_not_fade = over(
    lambda keys, held: held.update({name: t - 30 for name, t in held.items() if "A_log" in name}), transformers_model
)
convolved_backwards = over(
    lambda keys, held: held.update({name: t.flip(-1) for name, t in held.items() if "conv1d" in name}),
    transformers_model,
)
