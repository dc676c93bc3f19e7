"""The stage `model`: a checkpoint on disk and what computes its logits, here Qwen3-MoE in plain PyTorch.

    h_0 = embed_tokens[ids];  a = h_i + attention(norm(h_i));  h_{i+1} = a + mlp(norm(a));  logits = lm_head @ norm(h_n)

- load_model(model_dir, device=, dtype=): a folder as Hugging Face writes it, config.json and *.safetensors.
- model(input_ids [B, L]) -> logits [B, L, V].
- model.generate(prompts, max_new_tokens=, ...): the new tokens alone; greedy at temperature 0; prompts of any lengths.
- model.layer(i, hidden_states [B, L, H]), optional: one layer alone, so that a wrong model can be bisected.
- Families, or ranks, you do not serve: raise NotImplementedError, and the case is listed as unsupported.

    moe-harness check --stage model --impl FILE:load_model
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotated(x: Tensor, theta: float) -> Tensor:
    """x [B, heads, L, D] at the positions 0 to L - 1."""
    powers = torch.arange(0, x.shape[-1], 2, dtype=torch.float64, device=x.device) / x.shape[-1]
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * theta**-powers
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Model:
    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config, self.weights, self.eps = config, weights, config["rms_norm_eps"]
        self.theta = float((config.get("rope_parameters") or config).get("rope_theta", 10000.0))

    def __call__(self, input_ids: Tensor) -> Tensor:  # [B, L] -> [B, L, V]
        hidden = self.weights["model.embed_tokens.weight"][input_ids]
        for i in range(self.config["num_hidden_layers"]):
            hidden = self.layer(i, hidden)
        head = "model.embed_tokens" if self.config.get("tie_word_embeddings") else "lm_head"
        return norm(hidden, self.weights["model.norm.weight"], self.eps) @ self.weights[f"{head}.weight"].T

    def layer(self, i: int, hidden_states: Tensor) -> Tensor:  # [B, L, H] -> [B, L, H]
        start = f"model.layers.{i}."
        own = {name[len(start) :]: weight for name, weight in self.weights.items() if name.startswith(start)}
        after = hidden_states + self.attention(own, norm(hidden_states, own["input_layernorm.weight"], self.eps))
        normed = norm(after, own["post_attention_layernorm.weight"], self.eps)
        mlp = self.experts if "mlp.gate.weight" in own else self.dense
        return after + mlp(own, normed)

    def attention(self, own: dict[str, Tensor], x: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]

        def split(name: str, number: int) -> Tensor:  # [B, number, L, D]
            flat = F.linear(x, own[f"self_attn.{name}_proj.weight"], own.get(f"self_attn.{name}_proj.bias"))
            return flat.unflatten(-1, (number, -1)).transpose(1, 2)

        q, k, v = split("q", heads), split("k", groups), split("v", groups)
        q = rotated(norm(q, own["self_attn.q_norm.weight"], self.eps), self.theta)
        k = rotated(norm(k, own["self_attn.k_norm.weight"], self.eps), self.theta)
        k, v = (rows.repeat_interleave(heads // groups, 1) for rows in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(mixed, own["self_attn.o_proj.weight"], own.get("self_attn.o_proj.bias"))

    def dense(self, own: dict[str, Tensor], x: Tensor, at: str = "mlp.") -> Tensor:
        hidden = F.silu(x @ own[f"{at}gate_proj.weight"].T) * (x @ own[f"{at}up_proj.weight"].T)
        return hidden @ own[f"{at}down_proj.weight"].T

    def experts(self, own: dict[str, Tensor], x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        top, ids = (rows @ own["mlp.gate.weight"].T).float().softmax(-1).topk(self.config["num_experts_per_tok"], -1)
        if self.config.get("norm_topk_prob", False):
            top = top / top.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            out[token] += self.dense(own, rows[token], f"mlp.experts.{expert}.") * top[token, slot, None].to(x.dtype)
        return out.view(x.shape)

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float = 0.0, seed: int = 0,
        stop_token_ids: Any = (), ignore_eos: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        """One prompt after the other, all of it anew for every token; to be replaced by a batch and a cache of keys."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        eos = self.config.get("eos_token_id")
        ends = {*stop_token_ids, *([] if ignore_eos or eos is None else eos if isinstance(eos, list) else [eos])}
        device, found = self.weights["model.norm.weight"].device, []
        for prompt, limit in zip(prompts, limits, strict=True):
            generator, new = torch.Generator().manual_seed(seed), list[int]()
            while len(new) < limit and not (new and new[-1] in ends):
                logits = self(torch.tensor([prompt + new], device=device))[0, -1].float().cpu()
                chances = (logits / temperature).softmax(0) if temperature > 0 else None
                drawn = logits.argmax() if chances is None else torch.multinomial(chances, 1, generator=generator)
                new.append(int(drawn))
            found.append(new)
        return found


def load_model(
    model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False,
    dispatcher: str = "local_allreduce",
) -> Model:  # fmt: skip
    config = json.loads((Path(model_dir) / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or group is not None or config.get("rope_scaling"):
        raise NotImplementedError("other families than qwen3_moe, ranks, scaled angles")
    files = sorted(Path(model_dir).glob("*.safetensors"))
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    return Model(config, {name: weight.to(device, dtype) for name, weight in weights.items()})
