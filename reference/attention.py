r"""Attention of the decoders, from the normed stream [B, L, H] to its output, the residual not included.

Grouped queries (Ainslie et al., https://arxiv.org/abs/2305.13245), as in Qwen:

    q, k, v = projections of x                          heads of q and k normed where the checkpoint has a weight for it
    out     = o_proj(attend(rotate(q), rotate(k), v))   times sigmoid(gate), one per element, in Qwen3-Next

Latent attention (MLA; DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1), where a position keeps R + D_rope
numbers for all heads together:

    q          = q_proj(x)  or  q_b_proj(norm(q_a_proj(x)))                     [Hq, D_nope + D_rope]
    c, k_rope  = kv_a_proj_with_mqa(x),   c normed, k_rope turned               [R], [D_rope]: what is kept
    k_nope, v  = kv_b_proj(c)                                                   [Hq, D_nope], [Hq, D_v]
    out        = o_proj(attend([q_nope, rotate(q_rope)], [k_nope, k_rope], v))
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_harness.reference.layers import (
    Attend,
    Parts,
    Rotate,
    State,
    attend,
    rotate_halves,
    rotate_interleaved,
    turn,
)
from moe_harness.reference.rope import rope

LATENT_EPS = 1e-6  # of the norms inside latent attention, whatever rms_norm_eps says


class Attention(Protocol):
    """Attention of one model.

    Attributes:
        parts: computations on the checkpoint's weights.
        head_dim: the width of a query.
        rotate, attend: steps of the computation.
    """

    parts: Parts
    head_dim: int
    rotate: Rotate
    attend: Attend

    def __call__(self, i: int, x: Tensor, state: State) -> Tensor: ...


class GroupedQuery:
    """Attention with several query heads on each head of keys and values.

    Args:
        gated: q_proj gives a gate beside each head's query.

    Raises:
        ValueError: scaled rotary angles.
    """

    rotate: Rotate
    attend: Attend

    def __init__(self, config: Mapping[str, Any], parts: Parts, gated: bool = False):
        self.parts, self.gated, self.rotate, self.attend = parts, gated, rotate_halves, attend
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        share = (config.get("rope_parameters") or {}).get("partial_rotary_factor") or config.get(
            "partial_rotary_factor"
        )
        self.rope = rope(config, int(self.head_dim * (share or 1.0)))

    def __call__(self, i: int, x: Tensor, state: State) -> Tensor:
        """[B, L, H] -> [B, L, H]; extends state.past[i]."""
        name, parts, heads = f"model.layers.{i}.self_attn", self.parts, (*x.shape[:2], -1, self.head_dim)
        q, k, v = (state.store("qkv", parts.linear(x, f"{name}.{part}_proj")) for part in "qkv")
        gate = None
        if self.gated:
            q, gate = q.view(*x.shape[:2], -1, 2 * self.head_dim).chunk(2, dim=-1)
        q, k, v = q.reshape(heads), k.view(heads), v.view(heads)
        if f"{name}.q_norm.weight" in parts.weights:
            q, k = parts.norm(q, f"{name}.q_norm", state), parts.norm(k, f"{name}.k_norm", state)
        angles = turn(self.rope, state.start(i), x, state)
        q, k = self.rotate(q, angles, state), self.rotate(k, angles, state)
        mixed = state.store("attention", self.attend(q, *state.extend(i, (k, v)), self.head_dim**-0.5, state))
        if gate is not None:
            mixed = state.store("gate", mixed * state.store("gate", torch.sigmoid(gate)))
        return state.store("attention_output", parts.linear(mixed.flatten(2), f"{name}.o_proj"))


class Latent:
    """DeepSeek's attention over a compressed cache.

    Raises:
        ValueError: rotary angles scaled otherwise than by YaRN.
    """

    rotate: Rotate
    attend: Attend

    def __init__(self, config: Mapping[str, Any], parts: Parts):
        self.parts, self.rotate, self.attend = parts, rotate_interleaved, attend
        self.rank: int = config["kv_lora_rank"]
        self.nope: int = config["qk_nope_head_dim"]
        self.turned: int = config["qk_rope_head_dim"]
        self.head_dim = self.nope + self.turned
        self.rope = rope(config, self.turned, ("default", "yarn"))
        self.scale = self.head_dim**-0.5 * self.rope.sharpness

    def __call__(self, i: int, x: Tensor, state: State) -> Tensor:
        """[B, L, H] -> [B, L, H]; extends state.past[i]."""
        name, parts = f"model.layers.{i}.self_attn", self.parts
        angles = turn(self.rope, state.start(i), x, state)
        q = self._query(f"{name}.q", x, state).unflatten(-1, (-1, self.head_dim))
        q_nope, q_rope = q.split((self.nope, self.turned), dim=-1)
        q = torch.cat((q_nope, self.rotate(q_rope, angles, state)), dim=-1)
        kept = state.store("qkv", parts.linear(x, f"{name}.kv_a_proj_with_mqa"))
        latent, k_rope = kept.split((self.rank, self.turned), dim=-1)
        latent = parts.norm(latent, f"{name}.kv_a_layernorm", state, LATENT_EPS)
        k_rope = self.rotate(k_rope[:, :, None], angles, state)
        latent, k_rope = state.extend(i, (latent, k_rope))
        expanded = state.store("qkv", parts.linear(latent, f"{name}.kv_b_proj"))
        k_nope, v = expanded.unflatten(-1, (q.shape[2], -1)).tensor_split((self.nope,), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, q.shape[2], -1)), dim=-1)
        mixed = state.store("attention", self.attend(q, k, v, self.scale, state)).flatten(2)
        return state.store("attention_output", parts.linear(mixed, f"{name}.o_proj"))

    def _query(self, name: str, x: Tensor, state: State) -> Tensor:
        """[B, L, Hq * D], through a low rank where the checkpoint has one."""
        if f"{name}_proj.weight" in self.parts.weights:
            return state.store("qkv", self.parts.linear(x, f"{name}_proj"))
        low = state.store("qkv", self.parts.linear(x, f"{name}_a_proj"))
        low = self.parts.norm(low, f"{name}_a_layernorm", state, LATENT_EPS)
        return state.store("qkv", self.parts.linear(low, f"{name}_b_proj"))
