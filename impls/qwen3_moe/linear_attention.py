r"""The two kinds of attention of Qwen3-Next, in plain torch: no kernel of ours runs them yet.

Gated attention: q_proj gives a gate beside each head's query, the first `turned` dimensions of a head are rotated, and
the heads' output is multiplied by sigmoid(gate).

The gated delta net (Yang et al., https://arxiv.org/abs/2412.06464) keeps for every sequence a matrix S of each value
head and the last inputs of a convolution, whatever the length of the text:

    S_t   = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T           [Dk, Dv]
    out_t = norm(S_t^T q_t) * silu(z_t)

All sequences of a step go through it side by side, one position after the other.  A sequence that begins (position 0)
begins with nothing, so that a row which another one has left need not be cleared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.qwen3_moe.config import Config, Linear
from moe_harness.impls.qwen3_moe.pieces import Cut, Piece
from moe_harness.impls.torch.rms_norm import normalised

if TYPE_CHECKING:
    from moe_harness.impls.qwen3_moe.network import Flat, Network
    from moe_harness.impls.qwen3_moe.outputs import Unsummed
    from moe_harness.impls.qwen3_moe.weights import Layout

LENGTH_EPS = 1e-6  # below the square of a query's or key's length


@dataclass(frozen=True)
class Memory:
    """What one layer keeps of each sequence, by its row; one row more than there are, for pad rows."""

    inputs: Tensor  # [rows + 1, K - 1, C], of the convolution
    matrices: Tensor  # [rows + 1, Hv, Dk, Dv], at least fp32

    @classmethod
    def empty(cls, sizes: Linear, rows: int, dtype: torch.dtype, device: torch.device) -> Memory:
        wide = torch.promote_types(dtype, torch.float32)
        matrices = (rows + 1, sizes.value_heads, sizes.key, sizes.value)
        inputs = (rows + 1, sizes.kernel - 1, sizes.channels)
        return cls(torch.zeros(inputs, dtype=dtype, device=device), torch.zeros(matrices, dtype=wide, device=device))


def share(layout: Layout, whole: Linear) -> Linear:
    """The heads of one rank."""
    held = layout.share("linear_num_key_heads", whole.key_heads, layout.ranks)
    return replace(whole, key_heads=held, value_heads=whole.value_heads // whole.key_heads * held)


def pieces(layout: Layout, i: int) -> Iterator[tuple[str, Piece]]:
    """Tensors of the first half of layer i where it is a delta net, cut by key heads with their value heads.

    The convolution's weight stays whole: in it the channels of all heads' queries, keys and values follow each other.
    """
    c, layer, own = layout.config, f"model.layers.{i}", layout.linear
    assert c.linear is not None and own is not None
    whole, name, hidden = c.linear, f"{layer}.linear_attn", c.hidden_size
    group = whole.value_heads // whole.key_heads

    def cut(part: str, shape: tuple[int, ...], dim: int, per_head: int) -> tuple[str, Piece]:
        """The share of a tensor that has `per_head` rows or columns of each key head."""
        size = own.key_heads * per_head
        layout.shapes[f"{name}.{part}"] = (*shape[:dim], size, *shape[dim + 1 :])
        return f"{name}.{part}", Piece(shape, f"{name}.{part}", (), Cut(dim, layout.rank * size, size))

    wide = 2 * whole.key + 2 * group * whole.value
    yield layout.whole(f"{layer}.input_layernorm.weight", hidden)
    yield layout.whole(f"{layer}.post_attention_layernorm.weight", hidden)
    yield cut("in_proj_qkvz.weight", (whole.key_heads * wide, hidden), 0, wide)
    yield cut("in_proj_ba.weight", (2 * whole.value_heads, hidden), 0, 2 * group)
    yield layout.whole(f"{name}.conv1d.weight", whole.channels, 1, whole.kernel)
    yield cut("dt_bias", (whole.value_heads,), 0, group)
    yield cut("A_log", (whole.value_heads,), 0, group)
    yield layout.whole(f"{name}.norm.weight", whole.value)
    yield cut("out_proj.weight", (hidden, whole.value_heads * whole.value), 1, group * whole.value)


def gated(network: Network, name: str, x: Tensor, flat: Flat, keys: Tensor, values: Tensor) -> Tensor | Unsummed:
    """Gated attention, [T, H] -> [T, H]."""
    c, d = network.config, network.config.head_dim
    heads, kv_heads = network.layout.heads, network.layout.kv_heads
    qkv = F.linear(x, network.p[f"{name}.qkv_proj.weight"], network.p.get(f"{name}.qkv_proj.bias"))
    q, k, v = qkv.split((2 * heads * d, kv_heads * d, kv_heads * d), dim=-1)
    q, gate = q.unflatten(-1, (heads, 2 * d)).chunk(2, dim=-1)
    k, v = (part.unflatten(-1, (kv_heads, d)) for part in (k, v))
    wide = torch.promote_types(x.dtype, torch.float32)
    q, k = (
        _turned(normalised(part.to(wide), network.p[f"{name}.{which}_norm.weight"], c.eps), flat.positions, c)
        for part, which in ((q, "q"), (k, "k"))
    )
    kept = flat.slots >= 0
    at = flat.slots[kept].long()
    page, offset = at // keys.shape[1], at % keys.shape[1]
    keys[page, offset] = k[kept].to(keys.dtype)
    values[page, offset] = v[kept]
    mixed = network.attend(q.to(x.dtype), flat, keys, values) * torch.sigmoid(gate)
    out = F.linear(mixed.flatten(1), network.p[f"{name}.o_proj.weight"], network.p.get(f"{name}.o_proj.bias"))
    return network.reduced(out)


def _turned(x: Tensor, positions: Tensor, config: Config) -> Tensor:
    """x [T, heads, D] with the halves of its first `turned` dimensions rotated."""
    assert config.linear is not None
    width = config.linear.turned
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width
    angles = (positions.double()[:, None] * config.theta**-exponents)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :width].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., width:]), dim=-1)


class DeltaNet:
    """The gated delta nets of one network."""

    def __init__(self, network: Network):
        assert network.config.linear is not None and network.layout.linear is not None
        self.network, self.sizes, self.eps = network, network.layout.linear, network.config.eps
        self.whole, self.rank = network.config.linear, network.layout.rank

    def __call__(self, name: str, x: Tensor, flat: Flat, memory: Memory) -> Tensor | Unsummed:
        """[T, H] -> [T, H]; goes on from `memory` and leaves there what the next step goes on from."""
        if not len(x):
            return self.network.reduced(torch.zeros_like(x))
        assert flat.rows is not None
        side = _SideBySide(flat.query_start)
        q, k, v, z = self._projected(name, x)
        decay, beta = self._gates(name, x)
        inputs, matrices = memory.inputs[flat.rows], memory.matrices[flat.rows]
        fresh = flat.positions[flat.query_start[:-1].long()] == 0
        inputs = inputs.masked_fill(fresh[:, None, None], 0)
        matrices = matrices.masked_fill(fresh[:, None, None, None], 0)
        q, k, v, inputs = self._convolved(name, side, torch.cat((q, k, v), dim=-1), inputs)
        out, matrices = self._walked(side, q, k, v, side.spread(decay), side.spread(beta), matrices)
        memory.inputs[flat.rows] = inputs
        memory.matrices[flat.rows] = matrices
        rows = normalised(side.flat(out), self.network.p[f"{name}.norm.weight"], self.eps)
        gated = (rows * F.silu(z.to(rows.dtype))).to(x.dtype)
        return self.network.reduced(F.linear(gated.flatten(1), self.network.p[f"{name}.out_proj.weight"]))

    def _projected(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [T, heads * width] and z [T, Hv, Dv]; the checkpoint has them key head by key head."""
        s = self.sizes
        values = s.value_heads // s.key_heads * s.value
        rows = F.linear(x, self.network.p[f"{name}.in_proj_qkvz.weight"]).unflatten(-1, (s.key_heads, -1))
        q, k, v, z = rows.split((s.key, s.key, values, values), dim=-1)
        return q.flatten(1), k.flatten(1), v.flatten(1), z.flatten(1).unflatten(-1, (s.value_heads, s.value))

    def _gates(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """exp(g) and beta, [T, Hv]."""
        wide, p = torch.promote_types(x.dtype, torch.float32), self.network.p
        rows = F.linear(x, p[f"{name}.in_proj_ba.weight"]).unflatten(-1, (self.sizes.key_heads, -1))
        b, a = (part.flatten(1).to(wide) for part in rows.chunk(2, dim=-1))
        rate, shift = (p[f"{name}.{part}"].to(wide) for part in ("A_log", "dt_bias"))
        return (-rate.exp() * F.softplus(a + shift)).exp(), torch.sigmoid(b)

    def _convolved(self, name: str, side: _SideBySide, new: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """q, k [S, L, Hv, Dk], v [S, L, Hv, Dv] and the inputs [S, K - 1, C] that the next step goes on from."""
        s, wide = self.sizes, torch.promote_types(new.dtype, torch.float32)
        inputs = torch.cat((before, side.spread(new)), dim=1)  # [S, K - 1 + L, C]
        last = side.lengths[:, None] + torch.arange(s.kernel - 1, device=new.device)
        left = inputs.gather(1, last[..., None].expand(-1, -1, inputs.shape[-1]))
        weight = self._own_channels(self.network.p[f"{name}.conv1d.weight"][:, 0]).to(wide)
        rows = F.silu(torch.einsum("slck,ck->slc", inputs.to(wide).unfold(1, s.kernel, 1), weight))
        keys = s.key_heads * s.key
        q, k, v = rows.split((keys, keys, s.value_heads * s.value), dim=-1)
        q, k = (self._of_length_one(part) for part in (q, k))
        return q * s.key**-0.5, k, v.unflatten(-1, (s.value_heads, s.value)), left

    def _own_channels(self, weight: Tensor) -> Tensor:
        """The rows of this rank's queries, keys and values, of [C, K] of all heads."""
        keys, values = self.whole.key_heads * self.whole.key, self.whole.value_heads * self.whole.value
        parts = weight.split((keys, keys, values))
        return torch.cat([part.tensor_split(self.whole.key_heads // self.sizes.key_heads)[self.rank] for part in parts])

    def _of_length_one(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.sizes.key_heads, self.sizes.key))
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
        return x.repeat_interleave(self.sizes.value_heads // self.sizes.key_heads, dim=2)

    @staticmethod
    def _walked(
        side: _SideBySide, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is read at every position [S, L, Hv, Dv], and the matrices behind each sequence's last."""
        found = []
        for t in range(side.longest):
            faded = decay[:, t, :, None, None] * matrices
            told = torch.einsum("shkv,shk->shv", faded, k[:, t])
            written = beta[:, t, :, None] * (v[:, t] - told)
            new = faded + k[:, t, :, :, None] * written[:, :, None]
            matrices = torch.where((t < side.lengths)[:, None, None, None], new, matrices)
            found.append(torch.einsum("shkv,shk->shv", matrices, q[:, t]))
        return torch.stack(found, dim=1), matrices


class _SideBySide:
    """The tokens of S sequences, [T, ...], as [S, L, ...] with L the longest one's."""

    def __init__(self, query_start: Tensor):
        start = query_start.long()
        self.lengths = start[1:] - start[:-1]
        self.longest = int(self.lengths.max())
        place = torch.arange(self.longest, device=start.device)
        self.live = place < self.lengths[:, None]  # [S, L]
        self.at = (start[:-1, None] + place).masked_fill(~self.live, 0)

    def spread(self, rows: Tensor) -> Tensor:
        return rows[self.at]

    def flat(self, rows: Tensor) -> Tensor:
        return rows[self.live]
