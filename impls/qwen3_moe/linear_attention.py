r"""Linear attention of Qwen3-Next.

The gated delta net (Yang et al., https://arxiv.org/abs/2412.06464) keeps for every sequence a matrix S of each value
head and the last inputs of a convolution, whatever the length of the text:

    S_t   = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T           [Dk, Dv]
    out_t = norm(S_t^T q_t) * silu(z_t)

A step in which every sequence decodes is one launch where the library has one (`delta_step`); in any other the
convolution is plain torch and the walk along the sequences a kernel (`delta_walk`).  A sequence that begins (position
0) begins with nothing, so that a row which another one has left need not be cleared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.qwen3_moe.config import Linear
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

    inputs: Tensor  # [rows + 1, K, C], of the convolution: that of position p in place p mod K
    matrices: Tensor  # [rows + 1, Hv, Dk, Dv], at least fp32

    @classmethod
    def empty(cls, sizes: Linear, rows: int, dtype: torch.dtype, device: torch.device) -> Memory:
        wide = torch.promote_types(dtype, torch.float32)
        matrices = (rows + 1, sizes.value_heads, sizes.key, sizes.value)
        inputs = (rows + 1, sizes.kernel, sizes.channels)
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


class DeltaNet:
    """The gated delta nets of one network."""

    def __init__(self, network: Network):
        assert network.config.linear is not None and network.layout.linear is not None
        self.network, self.sizes, self.eps = network, network.layout.linear, network.config.eps
        self.whole, self.rank = network.config.linear, network.layout.rank
        names = [f"model.layers.{i}.linear_attn" for i in self.whole.layers]
        self.taps = {name: self._own_channels(network.p[f"{name}.conv1d.weight"][:, 0]) for name in names}

    def __call__(self, name: str, x: Tensor, flat: Flat, memory: Memory) -> Tensor | Unsummed:
        """[T, H] -> [T, H]; goes on from `memory` and leaves there what the next step goes on from."""
        if not len(x):
            return self.network.reduced(torch.zeros_like(x))
        p, joined = self.network.p, self.network.kernels.joined
        qkvz, ba = (F.linear(x, p[f"{name}.in_proj_{part}.weight"]) for part in ("qkvz", "ba"))
        if joined is not None and flat.decoding == len(flat.context):
            held = (p[f"{name}.{part}"] for part in ("A_log", "dt_bias", "norm.weight"))
            kept = (memory.inputs, memory.matrices, flat.rows, flat.positions)
            out = joined.delta_step(qkvz, ba, self.taps[name], *held, *kept, eps=self.eps)
        else:
            out = self._walked(name, qkvz, ba, flat, memory)
        return self.network.reduced(F.linear(out, p[f"{name}.out_proj.weight"]))

    def _walked(self, name: str, qkvz: Tensor, ba: Tensor, flat: Flat, memory: Memory) -> Tensor:
        """What goes into the last projection, [T, Hv * Dv]."""
        *new, z = self._parted(qkvz)
        q, k, v = self._convolved(name, torch.cat(new, dim=-1), flat, memory.inputs)
        where = (memory.matrices, flat.rows, flat.query_start, flat.positions)
        out = self.network.kernels.delta_walk(q, k, v, *self._gates(name, ba), *where)
        rows = normalised(out, self.network.p[f"{name}.norm.weight"], self.eps)
        return (rows * F.silu(z.to(rows.dtype))).to(qkvz.dtype).flatten(1)

    def _parted(self, qkvz: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [T, heads * width] and z [T, Hv, Dv]; the checkpoint has them key head by key head."""
        s = self.sizes
        values = s.value_heads // s.key_heads * s.value
        q, k, v, z = qkvz.unflatten(-1, (s.key_heads, -1)).split((s.key, s.key, values, values), dim=-1)
        return q.flatten(1), k.flatten(1), v.flatten(1), z.flatten(1).unflatten(-1, (s.value_heads, s.value))

    def _gates(self, name: str, ba: Tensor) -> tuple[Tensor, Tensor]:
        """exp(g) and beta, [T, Hv]."""
        wide, p = torch.promote_types(ba.dtype, torch.float32), self.network.p
        rows = ba.unflatten(-1, (self.sizes.key_heads, -1))
        b, a = (part.flatten(1).to(wide) for part in rows.chunk(2, dim=-1))
        rate, shift = (p[f"{name}.{part}"].to(wide) for part in ("A_log", "dt_bias"))
        return (-rate.exp() * F.softplus(a + shift)).exp(), torch.sigmoid(b)

    def _convolved(self, name: str, new: Tensor, flat: Flat, ring: Tensor) -> tuple[Tensor, ...]:
        """q, k [T, Hk, Dk] and v [T, Hv, Dv] of new inputs [T, C], whose last ones go into the ring."""
        s, kernel, wide = self.sizes, self.sizes.kernel, torch.promote_types(new.dtype, torch.float32)
        assert flat.rows is not None
        start = flat.query_start.long()
        token = torch.arange(len(new), device=new.device)
        place = torch.repeat_interleave(start[1:] - start[:-1], output_size=len(new))  # the sequence of each token
        row, within, position = flat.rows[place], (token - start[place])[:, None], flat.positions.long()
        taps = self.taps[name].to(wide)
        total = new.to(wide) * taps[:, -1]
        for back in range(1, kernel):
            held = ring[row, (position - back) % kernel].masked_fill((position < back)[:, None], 0)
            before = torch.where(within >= back, new.roll(back, 0), held)
            total += before.to(wide) * taps[:, -1 - back]
        self._keep(new, flat, ring)
        keys = s.key_heads * s.key
        q, k, v = F.silu(total).split((keys, keys, s.value_heads * s.value), dim=-1)
        q, k = (self._of_length_one(part) for part in (q, k))
        return q * s.key**-0.5, k, v.unflatten(-1, (s.value_heads, s.value))

    def _keep(self, new: Tensor, flat: Flat, ring: Tensor) -> None:
        """The last K inputs of each sequence go into its row of the ring; of shorter ones the rest into the pad row."""
        assert flat.rows is not None
        start = flat.query_start.long()
        last = start[1:, None] - 1 - torch.arange(self.sizes.kernel, device=new.device)
        real = last >= start[:-1, None]
        last = last.clamp(min=0)
        to = torch.where(real, flat.rows[:, None], len(ring) - 1)
        ring[to, flat.positions.long()[last] % self.sizes.kernel] = new[last]

    def _own_channels(self, weight: Tensor) -> Tensor:
        """The rows of this rank's queries, keys and values, of [C, K] of all heads."""
        keys, values = self.whole.key_heads * self.whole.key, self.whole.value_heads * self.whole.value
        parts = weight.split((keys, keys, values))
        return torch.cat([part.tensor_split(self.whole.key_heads // self.sizes.key_heads)[self.rank] for part in parts])

    def _of_length_one(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.sizes.key_heads, self.sizes.key))
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
