r"""The gated delta net of Qwen3-Next (Yang et al., https://arxiv.org/abs/2412.06464), step by step.

    [q; k; v], z  = parts of in_proj_qkvz(x)         then q, k, v through silu of a causal convolution of K positions
    b, a          = in_proj_ba(x)                    one number each per value head
    q, k          = q / |q| / sqrt(Dk),  k / |k|     shared by the Hv / Hk value heads of a key head

    S_t   = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T           [Dk, Dv] for each value head
    out_t = out_proj(norm(S_t^T q_t) * silu(z_t))

    beta = sigmoid(b),  g = -exp(A_log) softplus(a + dt_bias)

Each head keeps a matrix and the convolution K - 1 positions, whatever the length of the text.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.reference.layers import Parts, State

LENGTH_EPS = 1e-6  # below the square of a query's or key's length


class DeltaNet:
    """Linear attention of one model."""

    def __init__(self, config: Mapping[str, Any], parts: Parts):
        self.parts, self.eps = parts, config["rms_norm_eps"]
        self.key_heads: int = config["linear_num_key_heads"]
        self.value_heads: int = config["linear_num_value_heads"]
        self.key_dim: int = config["linear_key_head_dim"]
        self.value_dim: int = config["linear_value_head_dim"]
        self.kernel: int = config["linear_conv_kernel_dim"]

    def __call__(self, i: int, x: Tensor, state: State) -> Tensor:
        """[B, L, H] -> [B, L, H]; state.past[i]: last inputs of the convolution [B, K - 1, C], S [B, Hv, Dk, Dv]."""
        name, parts = f"model.layers.{i}.linear_attn", self.parts
        q, k, v, z = self._projected(name, x, state)
        decay, beta = self._gates(name, x, state)
        tail, memory = state.past.get(i, (None, None))
        mixed = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        mixed = F.pad(mixed, (0, 0, self.kernel - 1, 0)) if tail is None else torch.cat((tail, mixed), dim=1)
        tail = mixed[:, mixed.shape[1] - self.kernel + 1 :]
        q, k, v = self._convolved(name, mixed, state)
        if memory is None:
            memory = x.new_zeros(len(x), self.value_heads, self.key_dim, self.value_dim)
        found = []
        for t in range(x.shape[1]):
            memory = decay[:, t, :, None, None] * memory
            told = torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
            written = state.store("written", beta[:, t, :, None] * (v[:, t] - told))
            memory = memory + k[:, t, :, :, None] * written[:, :, None]
            found.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
        state.past[i] = (tail, memory)
        rows = state.store("attention", torch.stack(found, dim=1))
        rows = state.store("norm", rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps))
        rows = state.store("norm_scaled", rows * parts.weights[f"{name}.norm.weight"].to(x.dtype))
        gated = state.store("gate", rows * state.store("gate", F.silu(z)))
        return state.store("attention_output", parts.linear(gated.flatten(2), f"{name}.out_proj"))

    def _projected(self, name: str, x: Tensor, state: State) -> tuple[Tensor, ...]:
        """q, k [B, L, Hk, Dk], v and z [B, L, Hv, Dv]: the checkpoint has them key head by key head."""
        values = self.value_heads // self.key_heads * self.value_dim
        rows = state.store("qkv", self.parts.linear(x, f"{name}.in_proj_qkvz")).unflatten(-1, (self.key_heads, -1))
        q, k, v, z = rows.split((self.key_dim, self.key_dim, values, values), dim=-1)
        return q, k, *(part.flatten(2).unflatten(-1, (-1, self.value_dim)) for part in (v, z))

    def _gates(self, name: str, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """exp(g) and beta, both [B, L, Hv]."""
        rows = state.store("qkv", self.parts.linear(x, f"{name}.in_proj_ba")).unflatten(-1, (self.key_heads, -1))
        b, a = (part.flatten(2) for part in rows.chunk(2, dim=-1))
        rate, shift = (self.parts.weights[f"{name}.{part}"].to(x.dtype) for part in ("A_log", "dt_bias"))
        return (-rate.exp() * F.softplus(a + shift)).exp(), state.store("gate", torch.sigmoid(b))

    def _convolved(self, name: str, mixed: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, L, Hv, Dk] of their lengths and v [B, L, Hv, Dv] from mixed [B, K - 1 + L, C]."""
        weight = self.parts.weights[f"{name}.conv1d.weight"].to(mixed.dtype)[:, 0]
        rows = state.store("convolved", torch.einsum("blck,ck->blc", mixed.unfold(1, self.kernel, 1), weight))
        rows = state.store("convolved", F.silu(rows))
        width = self.key_heads * self.key_dim
        q, k, v = rows.split((width, width, rows.shape[-1] - 2 * width), dim=-1)
        q, k = (self._of_length_one(part, state) for part in (q, k))
        return q * self.key_dim**-0.5, k, v.unflatten(-1, (-1, self.value_dim))

    def _of_length_one(self, x: Tensor, state: State) -> Tensor:
        x = x.unflatten(-1, (-1, self.key_dim))
        x = state.store("norm", x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS))
        return x.repeat_interleave(self.value_heads // self.key_heads, dim=2)
