r"""The decoder on flat batches: token ids to the residual stream to logits, over pages of keys and values.

    x, h = rms_norm(mlp output, residual=h)      q, k, v = qkv @ x      q' = rope_cache(q, k, v)   writes k, v
    y, h = rms_norm(o @ attention(q'), residual=h)                      w, ids = router(gate @ y)  mlp = experts(y)

The residual is added where the next norm reads it, so a layer passes on the pair (last output, stream before it).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.impls.qwen3_moe.expert_layouts import ExpertLayout, Summed, alone
from moe_harness.impls.qwen3_moe.kernels import Joined, Kernels
from moe_harness.impls.qwen3_moe.latent import LatentAttention
from moe_harness.impls.qwen3_moe.linear_attention import DeltaNet, Memory
from moe_harness.impls.qwen3_moe.outputs import BySlot, Output, Parts, Unsummed
from moe_harness.impls.qwen3_moe.ranks import DISAGREE, Ranks
from moe_harness.impls.qwen3_moe.weights import Layout
from moe_harness.impls.torch.cut import kept
from moe_harness.impls.torch.sampler import inverse_of


class Cache:
    """What attention keeps, in pages.  `shared`: all layers use the same pages, for who goes back to none.

    Layers of linear attention keep a `Memory` of `rows` sequences in the place of keys.

    Keys and values are [pages, page_size, Hk, D] each, inside a page head by head: a program of attention reads one
    head's part of a page, which so is one run of page_size * D elements.  Latent attention keeps rows of R + D_rope
    numbers, [pages + 1, page_size, 1, R + D_rope], keys and values in one; slot -1 lies in the page too many.
    """

    def __init__(
        self, layout: Layout, pages: int, page_size: int, dtype: torch.dtype, device: torch.device,
        shared: bool = False, rows: int = 0,
    ):  # fmt: skip
        layers, linear = layout.config.layers, layout.linear
        attending = layout.config.attending
        held = 1 if shared else len(attending)
        parts, heads, width = cache_shape(layout)
        if parts == 1:
            self.storage = torch.zeros(held, pages + 1, page_size, heads, width, dtype=dtype, device=device)
            self.keys: list[Any] = [self.storage[i % held] for i in range(layers)]
            self.values: list[Any] = self.keys
            return
        self.storage = torch.zeros(held, parts, pages, heads, page_size, width, dtype=dtype, device=device)
        views = self.storage.transpose(3, 4)
        places = {i: place % held for place, i in enumerate(attending)} if held else {}
        self.keys = [views[places[i], 0] if i in places else None for i in range(layers)]
        self.values = [views[places[i], 1] if i in places else None for i in range(layers)]
        if linear is not None:
            for i in linear.layers:
                self.keys[i] = Memory.empty(linear, rows, dtype, device)


def cache_shape(layout: Layout) -> tuple[int, int, int]:
    """What a layer keeps of a token: 2 (keys and values) or 1, times heads of this rank, times their width."""
    c = layout.config
    return (1, 1, c.latent.rank + c.latent.turned) if c.latent else (2, layout.kv_heads, c.head_dim)


@dataclass(frozen=True)
class Flat:
    """A batch of S sequences as T query tokens in a row; those with one query, the decoding ones, come first.

    positions, slots int [T]; query_start int [S + 1]; context int [S]; tables int [S, M], as in the stage
    paged_attention.  `decoding` is how many sequences lead with one query each.  A slot of -1 marks a pad row.
    """

    positions: Tensor
    slots: Tensor
    query_start: Tensor
    context: Tensor
    tables: Tensor
    decoding: int
    padded: bool = False
    rows: Tensor | None = None  # int64 [S], where linear attention keeps what it knows of each sequence
    rest_start: Tensor | None = field(init=False, default=None)  # query_start of the others, from 0

    def __post_init__(self) -> None:
        if 0 < self.decoding < len(self.context):
            object.__setattr__(self, "rest_start", self.query_start[self.decoding :] - self.decoding)

    @property
    def pads(self) -> Tensor | None:
        """int [T], negative in pad rows; None where there cannot be any."""
        return self.slots if self.padded else None


class Network:
    """The layers of one rank.

    Args:
        layout: sizes and this rank's share of them.
        parameters: as `layout.empty` makes them, filled.
        ranks: those that share attention, dense layers and the vocabulary; None where one rank holds them whole.
        experts: how sparse layers run over ranks.
    """

    def __init__(
        self, layout: Layout, parameters: dict[str, Tensor], kernels: Kernels, ranks: Ranks | None = None,
        experts: ExpertLayout = alone,
    ):  # fmt: skip
        self.layout, self.config, self.kernels = layout, layout.config, kernels
        self.ranks, self.experts = ranks, experts
        self.p = parameters if layout.config.linear is None else _of_excess(parameters)
        self.head = parameters["model.embed_tokens.weight" if layout.config.tied else "lm_head.weight"]
        self.latent = LatentAttention(self) if layout.config.latent else None
        self.delta = DeltaNet(self) if layout.config.linear else None

    def reduced(self, partial: Tensor) -> Tensor | Unsummed:
        """The sum of all ranks' partial results, or what the next norm makes it of; one rank's is whole."""
        if self.ranks is None:
            return partial
        later = self.ranks.sums_in_the_norm(partial.shape, partial.dtype)
        return Unsummed(partial) if later else self.ranks.reduced(partial)

    def finished(self, output: Output) -> Tensor:
        """`output` where no norm is behind it."""
        if isinstance(output, Tensor):
            return output
        # A whole sequence is no decoding step.
        assert isinstance(output, Unsummed) and isinstance(output.part, Tensor) and self.ranks is not None
        return self.ranks.reduced(output.part)

    def embed(self, ids: Tensor) -> Tensor | Unsummed:
        """[T] -> [T, H]; each rank knows the tokens of its own shard."""
        rows, own = self.p["model.embed_tokens.weight"], self.layout.vocabulary
        if self.ranks is None:
            return F.embedding(ids, rows)
        foreign = (ids < own.start) | (ids >= own.stop)
        found = F.embedding((ids - own.start).masked_fill_(foreign, 0), rows)
        return self.reduced(found.masked_fill_(foreign[..., None], 0))

    def __call__(self, ids: Tensor, flat: Flat, cache: Cache, rows: Tensor | None = None) -> Tensor:
        """Logits [T, V] of ids [T], or [R, V] of the chosen rows int [R] alone; V is the rank's share of tokens."""
        output: Output = self.embed(ids)
        stream: Tensor | None = None
        for i in range(self.config.layers):
            output, stream = self.layer(i, output, stream, flat, cache.keys[i], cache.values[i])
        return self.logits(output, stream, rows)

    def logits(self, output: Output, stream: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """The last norm and the head of the sum of both, [T, H] -> [T or R, V]."""
        part = output.part if isinstance(output, Unsummed) else output
        if rows is not None and isinstance(part, Tensor):  # all rows of what is still by slot
            output = part[rows] if part is output else Unsummed(part[rows])
            stream = None if stream is None else stream[rows]
        x, _ = self.norm("model.norm.weight", output, stream)
        return F.linear(x, self.head)

    def whole(self, logits: Tensor) -> Tensor:
        """Logits [T, V] of all tokens from each rank's share of them."""
        if self.ranks is None:
            return logits
        shares = [len(self.layout.shares(rank)) for rank in range(self.ranks.size)]
        return self.ranks.columns(logits, shares)

    def sample(self, logits: Tensor, given: dict[str, Tensor], cuts: dict[str, Tensor], plan: Tensor) -> Tensor:
        """Tokens [R] of the logits of this rank's shard; no row is ever brought together.

        Args:
            given: temperature, seeds and positions of the stage `sampler`; `cuts`: top_k and top_p, or nothing.
            plan: the step's fingerprint, int64 [1].
        """
        if self.ranks is None:
            return self.kernels.sampler(logits, **given, **cuts)
        if cuts:
            logits = logits.masked_fill(~self._kept(logits, given["temperature"], **cuts), -torch.inf)
        first, joined = self.layout.vocabulary.start, self.kernels.joined
        if joined is not None and self.ranks.sum_norm is not None and len(logits):
            words = joined.shard_words(logits, **given, first=first, plan=plan)
            return joined.pick(self.ranks.gathered(words), given["temperature"], self.ranks.size, DISAGREE)
        candidates = self.kernels.best_in_shard(logits, **given, first=first)
        return self.ranks.winner(*candidates, inverse_of(given["temperature"], torch.float64), plan)

    def _kept(self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        """Which tokens of this rank's shard the cuts leave, bool [R, V]."""
        assert self.ranks is not None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top = self.ranks.largest(wide.amax(1))
        scores = (wide - top[:, None]) * inverse_of(temperature, wide.dtype)[:, None]
        return kept(scores, top_k, top_p, self.config.vocab_size, self.ranks)

    def layer(
        self, i: int, output: Output, stream: Tensor | None, flat: Flat, keys: Any, values: Any
    ) -> tuple[Output, Tensor]:
        """Layer i on the stream output + stream, both [T, H]: the mlp's output and the stream it belongs to."""
        name = f"model.layers.{i}"
        x, stream = self.norm(f"{name}.input_layernorm.weight", output, stream)
        output = self.mix(i, x, flat, keys, values)
        x, stream = self.norm(f"{name}.post_attention_layernorm.weight", output, stream)
        mlp = self.sparse if i in self.config.sparse_layers else self.dense
        return mlp(f"{name}.mlp", x, flat), stream

    def mix(self, i: int, x: Tensor, flat: Flat, keys: Any, values: Any) -> Output:
        """Attention of layer i, of whatever kind: [T, H] -> [T, H], without the residual."""
        layer, linear = f"model.layers.{i}", self.config.linear
        if linear is None or i not in linear.layers:
            return self.attention(f"{layer}.self_attn", x, flat, keys, values)
        assert self.delta is not None
        return self.delta(f"{layer}.linear_attn", x, flat, keys)

    def attention(self, name: str, x: Tensor, flat: Flat, keys: Tensor, values: Tensor) -> Output:
        """[T, H] -> [T, H], without the residual."""
        if self.latent is not None:
            return self.latent(name, x, flat, keys)
        c = self.config
        q, gate, k, v = self._projected(name, x)
        q = self._of_step(flat).rope_cache(
            q, k, v, flat.positions, flat.slots, keys, values,
            q_norm=self.p.get(f"{name}.q_norm.weight"), k_norm=self.p.get(f"{name}.k_norm.weight"),
            eps=c.eps, theta=c.theta, turned=c.turned,
        )  # fmt: skip
        mixed = self.attend(q, flat, keys, values)
        mixed = (mixed if gate is None else self.kernels.sigmoid_gate(mixed, gate)).flatten(1)
        parts = self._in_parts(f"{name}.o_proj", mixed, flat)
        if parts is not None:
            return Parts(parts) if self.ranks is None else Unsummed(Parts(parts))
        return self.reduced(F.linear(mixed, self.p[f"{name}.o_proj.weight"], self.p.get(f"{name}.o_proj.bias")))

    def _projected(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """q [T, Hq, D], what gates the output of each of its heads, k and v [T, Hk, D]; views of one projection."""
        d, heads, kv_heads = self.config.head_dim, self.layout.heads, self.layout.kv_heads
        qkv = F.linear(x, self.p[f"{name}.qkv_proj.weight"], self.p.get(f"{name}.qkv_proj.bias"))
        if self.config.linear is None:
            q, k, v = qkv.unflatten(-1, (-1, d)).split((heads, kv_heads, kv_heads), dim=1)
            return q, None, k, v
        q, k, v = qkv.unflatten(-1, (-1, d)).split((2 * heads, kv_heads, kv_heads), dim=1)
        return q[:, 0::2], q[:, 1::2], k, v

    def _of_step(self, flat: Flat) -> Kernels | Joined:
        """Kernels that may read what describes a batch before the kernel before has ended, if a whole step runs."""
        return self.kernels.joined if flat.padded and self.kernels.joined is not None else self.kernels

    def _in_parts(self, name: str, x: Tensor, flat: Flat) -> Tensor | None:
        """x times a weight in parts that the next kernel adds up, fp32 [n, T, N]; None where that gains nothing."""
        summed = self.ranks is None or self.ranks.sums_in_the_norm((len(x), self.config.hidden_size), x.dtype)
        if not flat.padded or self.kernels.joined is None or not summed or f"{name}.bias" in self.p:
            return None
        return self.kernels.joined.projection(x, self.p[f"{name}.weight"])

    def attend(self, q: Tensor, flat: Flat, keys: Tensor, values: Tensor) -> Tensor:
        scale, attend = self.config.head_dim**-0.5, self._of_step(flat).paged_attention
        return self.apart(q, flat, lambda q, *batch: attend(q, keys, values, *batch, scale=scale))

    def apart(self, q: Tensor, flat: Flat, attend: Callable[..., Tensor]) -> Tensor:
        """Decoding sequences and the others go to the kernel apart: it has another grid for each.

        Args:
            attend: takes queries, tables, query_start and context of a batch.
        """
        first = flat.decoding
        if flat.rest_start is None:
            return attend(q, flat.tables, flat.query_start, flat.context)
        decoded = attend(q[:first], flat.tables[:first], flat.query_start[: first + 1], flat.context[:first])
        return torch.cat((decoded, attend(q[first:], flat.tables[first:], flat.rest_start, flat.context[first:])))

    def sparse(self, name: str, x: Tensor, flat: Flat) -> Output:
        """Router, experts, and the shared expert where there is one: [T, H] -> [T, H]."""
        if flat.padded and self.kernels.joined is not None and not self.config.shared_expert_size:
            if self.experts is alone:
                return self._by_slot(name, x, flat)
            over = self.experts
            if isinstance(over, Summed) and over.dispatcher is None and over.ranks.sums_in_the_norm(x.shape, x.dtype):
                return Unsummed(self._by_slot(name, x, flat, over.local))
        return self.experts(self, name, x, flat.pads)

    def _by_slot(self, name: str, x: Tensor, flat: Flat, local: Tensor | None = None) -> BySlot:
        weights, ids = self.route(name, x, flat.pads)
        up, down = self.p[f"{name}.experts.gate_up_proj"], self.p[f"{name}.experts.down_proj"]
        assert self.kernels.joined is not None
        activation = self.config.activation
        rows = self.kernels.joined.experts_by_slot(x, up, down, ids, activation=activation, expert_map=local)
        return BySlot(rows, weights, ids, local)

    def route(self, name: str, x: Tensor, pads: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, k]; -1 in pad rows, which read no expert's weights."""
        c = self.config
        gate = self.p[f"{name}.gate.weight"]
        if pads is not None and self.kernels.joined is not None:
            return self.kernels.joined.router(x, gate, pads=pads, rounded=not c.router_in_fp32, **c.routing())
        wide = torch.promote_types(x.dtype, torch.float32) if c.router_in_fp32 else x.dtype
        logits = F.linear(x.to(wide), gate.to(wide))
        weights, ids = self.kernels.router(logits, **c.routing())
        return weights, ids if pads is None else ids.masked_fill_((pads < 0)[:, None], -1)

    def routed(self, name: str, x: Tensor, weights: Tensor, ids: Tensor, local: Tensor | None = None) -> Tensor:
        """The weighted sum over this rank's experts, by their local ids, or by those that `local` [E] makes of ids."""
        up, down = self.p[f"{name}.experts.gate_up_proj"], self.p[f"{name}.experts.down_proj"]
        activation = self.config.activation
        return self.kernels.experts(x, up, down, weights, ids, activation=activation, expert_map=local)

    def shared(self, name: str, x: Tensor) -> Tensor | None:
        """This rank's part of the shared expert, gated where it has a gate; None where there is none."""
        c = self.config
        if not c.shared_expert_size:
            return None
        out = self._gated(f"{name}.{c.shared_expert}", x)
        if c.shared_gate:
            out = self.kernels.shared_expert_gate(x, self.p[f"{name}.shared_expert_gate.weight"], out)
        return out

    def dense(self, name: str, x: Tensor, flat: Flat) -> Output:
        """The mlp of a layer without experts: [T, H] -> [T, H]."""
        return self.reduced(self._gated(name, x))

    def _gated(self, name: str, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.p[f"{name}.gate_up_proj.weight"]).chunk(2, dim=-1)
        act = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        return F.linear(act * up, self.p[f"{name}.down_proj.weight"])

    def norm(self, name: str, x: Output, stream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of x + stream, and that sum."""
        if isinstance(x, BySlot):
            assert stream is not None and self.kernels.joined is not None
            return self.kernels.joined.sum_norm(
                x.rows, x.weights, x.ids, stream, self.p[name], num_experts=self.config.num_experts, eps=self.config.eps
            )
        if isinstance(x, Parts):
            assert stream is not None and self.kernels.joined is not None
            return self.kernels.joined.norm_of_parts(x.parts, self.p[name], stream, eps=self.config.eps)
        if isinstance(x, Unsummed):
            return self._summed(x.part, self.p[name], stream)
        if stream is None:
            return self.kernels.rms_norm(x, self.p[name], eps=self.config.eps), x
        return self.kernels.rms_norm(x, self.p[name], eps=self.config.eps, residual=stream)

    def _summed(self, part: Tensor | BySlot | Parts, weight: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of the sum over ranks of `part` + stream, and that sum."""
        assert self.ranks is not None and self.ranks.sum_norm is not None
        through, eps = self.ranks.sum_norm, self.config.eps
        if isinstance(part, Tensor):
            return through(part, weight, eps=eps, residual=stream)
        assert stream is not None
        if isinstance(part, Parts):
            return through.of_pieces(part.parts, weight, eps=eps, residual=stream)
        return through.of_slots(
            part.rows, part.weights, part.ids, weight, eps=eps, residual=stream, num_experts=len(self.layout.held),
            local=part.local,
        )  # fmt: skip


def _of_excess(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Qwen3-Next's norms store what exceeds 1, to be added in fp32 and not in the dtype of the model."""
    found = dict(parameters)
    for name, weight in parameters.items():
        if name.endswith("norm.weight") and ".linear_attn." not in name:
            found[name] = weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1
    return found
