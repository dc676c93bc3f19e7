"""transformers' own models as implementations of the stage `model`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["model", "grouped_mm"]


class Model:
    """A loaded transformers model under the contract's names."""

    def __init__(self, module: Any, device: torch.device):
        self.module, self.device = module, device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, L, V] of input_ids [B, L]."""
        return self.module(input_ids.to(self.device)).logits

    @torch.no_grad()
    def layer(self, i: int, hidden_states: Tensor) -> Tensor:
        """Layer i alone on the residual stream [B, L, H] of positions 0 to L - 1."""
        hidden_states = hidden_states.to(self.device, self.module.dtype)
        layer = self.module.model.layers[i]
        out = layer(hidden_states, **self._positions(hidden_states) | self._unmasked(layer))
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def half(self, i: int, name: str, hidden_states: Tensor) -> Tensor:
        """One half of layer i on the residual stream [B, L, H]: "attention" or "mlp", residual included."""
        hidden_states, layer = hidden_states.to(self.device, self.module.dtype), self.module.model.layers[i]
        if name == "attention":
            x = layer.input_layernorm(hidden_states)
            if hasattr(layer, "linear_attn"):
                return hidden_states + layer.linear_attn(x)
            return hidden_states + layer.self_attn(hidden_states=x, **self._positions(hidden_states))[0]
        out = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states + (out[0] if isinstance(out, tuple) else out)

    def _unmasked(self, layer: Any) -> dict[str, Any]:
        """Linear attention (Qwen3-Next) takes a mask of pads alone, and there are none."""
        return {"attention_mask": None} if hasattr(layer, "linear_attn") else {}

    def _positions(self, hidden_states: Tensor) -> dict[str, Any]:
        """Causal mask and rotary angles of positions 0 to L - 1."""
        decoder, length = self.module.model, hidden_states.shape[1]
        positions = torch.arange(length, device=self.device)[None]
        later = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)
        mask = torch.zeros(length, length, dtype=hidden_states.dtype, device=self.device)
        mask = mask.masked_fill(later, torch.finfo(mask.dtype).min)[None, None]
        angles = decoder.rotary_emb(hidden_states, positions)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": angles}

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | Sequence[int], temperature: float = 0.0,
        seed: int = 0, stop_token_ids: Sequence[int] = (), ignore_eos: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens of every prompt, one call each: padding would change what rounding does."""
        counts = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        own = self.module.config.eos_token_id
        ends = list(stop_token_ids) + ([] if ignore_eos or own is None else [own] if isinstance(own, int) else own)
        found = []
        for prompt, count in zip(prompts, counts, strict=True):
            torch.manual_seed(seed)
            options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": count, "pad_token_id": 0}
            if temperature > 0:  # a config that says nothing of top_k is read as 50
                options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
            options["eos_token_id"] = ends or -1  # min_new_tokens would forbid the token instead of going on after it
            ids = torch.tensor([list(prompt)], device=self.device)
            out = self.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
            found.append(out[0, len(prompt) :].tolist())
        return found


def model(model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False,
          dispatcher: str = "") -> Model:  # fmt: skip
    """Loaded with transformers' defaults, but for the experts, which run eagerly.

    Raises:
        NotImplementedError: a process group.
    """
    return _load(model_dir, device, dtype, group, "eager")


def grouped_mm(model_dir: str, *, device: str, dtype: torch.dtype, group: Any = None, expert_parallel: bool = False,
               dispatcher: str = "") -> Model:  # fmt: skip
    """As `model`, with the experts through torch's grouped product."""
    return _load(model_dir, device, dtype, group, "grouped_mm")


def _load(model_dir: str, device: str, dtype: torch.dtype, group: Any, experts: str) -> Model:
    from transformers import AutoModelForCausalLM

    if group is not None:
        raise NotImplementedError("transformers runs here on one rank")
    module = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    if getattr(module.config, "num_experts", 0):
        module.set_experts_implementation(experts)
    return Model(module.eval().to(device), torch.device(device))
