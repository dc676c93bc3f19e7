r"""DeepSeek's latent attention (MLA, https://arxiv.org/abs/2405.04434): a rank's weights, and attention, absorbed.

Of every position R + D_rope numbers are kept for all heads, the normed latent c and the turned part of the key.  Keys
and values are never expanded: with W_k, W_v the two parts of kv_b_proj of a head,

    q . k = (W_k^T q_nope) . c + q_rope . k_rope              out = W_v sum_s p_s c_s

so that attention is that of many query heads over one head of width R + D_rope, for chunks of prompts too.  Ranks hold
heads; what is in front of them (the low ranks of queries and of keys and values) every rank has whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.qwen3_moe.pieces import Cut, Piece

if TYPE_CHECKING:
    from moe_harness.impls.qwen3_moe.network import Flat, Network
    from moe_harness.impls.qwen3_moe.outputs import Unsummed
    from moe_harness.impls.qwen3_moe.weights import Layout

EPS = 1e-6  # of the norms in here, whatever rms_norm_eps says


def pieces(layout: Layout, layer: str) -> Iterator[tuple[str, Piece]]:
    """Attention of one layer and the layer's norms: projections from the same input lie in one parameter."""
    c, sizes, attention = layout.config, layout.config.latent, f"{layer}.self_attn"
    assert sizes is not None
    hidden, heads, first = c.hidden_size, layout.heads, layout.rank * layout.heads
    yield layout.whole(f"{layer}.input_layernorm.weight", hidden)
    yield layout.whole(f"{layer}.post_attention_layernorm.weight", hidden)

    def of_heads(key: str, width: int, columns: int, to: str, at: int | None = None) -> tuple[str, Piece]:
        place = () if at is None else (slice(at, at + heads * width),)
        return key, Piece((c.heads * width, columns), to, place, Cut(0, first * width, heads * width))

    entry, kept = f"{attention}.qkv_a_proj.weight", sizes.rank + sizes.turned
    at = sizes.query_rank or heads * sizes.query
    layout.shapes[entry] = (at + kept, hidden)
    if sizes.query_rank:
        yield f"{attention}.q_a_proj.weight", Piece((sizes.query_rank, hidden), entry, (slice(0, at),))
        yield layout.whole(f"{attention}.q_a_layernorm.weight", sizes.query_rank)
        up = f"{attention}.q_b_proj.weight"
        layout.shapes[up] = (heads * sizes.query, sizes.query_rank)
        yield of_heads(up, sizes.query, sizes.query_rank, up)
    else:
        yield of_heads(f"{attention}.q_proj.weight", sizes.query, hidden, entry, 0)
    yield f"{attention}.kv_a_proj_with_mqa.weight", Piece((kept, hidden), entry, (slice(at, at + kept),))
    yield layout.whole(f"{attention}.kv_a_layernorm.weight", sizes.rank)
    expand = f"{attention}.kv_b_proj.weight"
    layout.shapes[expand] = (heads * (sizes.nope + sizes.value), sizes.rank)
    yield of_heads(expand, sizes.nope + sizes.value, sizes.rank, expand)
    output = f"{attention}.o_proj.weight"
    layout.shapes[output] = (hidden, heads * sizes.value)
    cut = Cut(1, first * sizes.value, heads * sizes.value)
    yield output, Piece((hidden, c.heads * sizes.value), output, (), cut)


class LatentAttention:
    """Attention of every layer of one rank."""

    def __init__(self, network: Network):
        self.network, sizes = network, network.config.latent
        assert sizes is not None
        weight = network.p["model.norm.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.sizes, self.scale = sizes, sizes.query**-0.5 * sizes.angles.sharpness
        self.turns = sizes.angles.table(network.config.max_positions, wide, weight.device)

    def __call__(self, name: str, x: Tensor, flat: Flat, cache: Tensor) -> Tensor | Unsummed:
        """[T, H] -> [T, H], without the residual; writes the tokens' rows into cache [P, page, 1, R + D_rope]."""
        network, sizes = self.network, self.sizes
        q, latent, k_rope = self._projected(name, x)
        angles = self.turns[:, flat.positions.long()]
        q_nope, q_rope = q.split((sizes.nope, sizes.turned), dim=-1)
        row = torch.cat((latent, self.turned(k_rope, *angles)), dim=-1)
        cache.view(-1, row.shape[-1])[flat.slots.long()] = row  # slot -1 is the last row of a page of its own
        keys, values = network.p[f"{name}.kv_b_proj.weight"].unflatten(0, (q.shape[1], -1)).split(
            (sizes.nope, sizes.value), dim=1
        )  # fmt: skip
        absorbed = torch.bmm(q_nope.transpose(0, 1), keys).transpose(0, 1)
        query = torch.cat((absorbed, self.turned(q_rope, *angles[:, :, None])), dim=-1)
        mixed = network.apart(query, flat, self._attend(cache))
        heads = torch.bmm(mixed.transpose(0, 1), values.transpose(1, 2)).transpose(0, 1)
        return network.reduced(F.linear(heads.flatten(1), network.p[f"{name}.o_proj.weight"]))

    def _projected(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D_nope + D_rope], normed latents [T, R], parts of the key to be turned [T, D_rope]."""
        p, sizes = self.network.p, self.sizes
        entered = F.linear(x, p[f"{name}.qkv_a_proj.weight"])
        q, latent, k_rope = entered.tensor_split((-sizes.rank - sizes.turned, -sizes.turned), dim=-1)
        if sizes.query_rank:
            q = F.linear(self.norm(q, f"{name}.q_a_layernorm"), p[f"{name}.q_b_proj.weight"])
        return q.unflatten(-1, (-1, sizes.query)), self.norm(latent, f"{name}.kv_a_layernorm"), k_rope

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Of a low rank, [T, n] -> [T, n]."""
        return self.network.kernels.rms_norm(x, self.network.p[f"{name}.weight"], eps=EPS)

    def _attend(self, cache: Tensor) -> Callable[..., Tensor]:
        attend, scale, rank = self.network.kernels.latent_attention, self.scale, self.sizes.rank
        return lambda q, tables, start, context: attend(q, cache, tables, start, context, scale=scale, rank=rank)

    @staticmethod
    def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [..., D] with each pair of neighbours turned, in the dtype of the angles [..., D / 2], then in its own."""
        even, odd = x[..., 0::2].to(cosine.dtype), x[..., 1::2].to(cosine.dtype)
        return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2).to(x.dtype)
