"""Which tensors a rank holds, and where each tensor of a checkpoint goes in them.

Tensors that are multiplied together are held together: q, k and v in one, gate and up in one, all experts in one.  With
several ranks a tensor is cut along heads, intermediate columns or experts; every key says so itself (`pieces.Piece`).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_harness.impls.qwen3_moe import latent, linear_attention
from moe_harness.impls.qwen3_moe.config import Config
from moe_harness.impls.qwen3_moe.pieces import Cut, Piece
from moe_harness.impls.qwen3_moe.placement import Placement


class Layout:
    """Parameters of one rank of a model, and the pieces of its checkpoint.

    Args:
        rank, world_size: this rank's place; heads and intermediate columns are cut evenly.
        expert_parallel: ranks hold whole experts instead of columns of all of them.
        placement: further arguments of `Placement`.

    Raises:
        ValueError: sizes that the ranks cannot share; what was got, what was wanted, and what to do.
    """

    def __init__(
        self, config: Config, rank: int = 0, world_size: int = 1, expert_parallel: bool = False, **placement: Any
    ):
        self.config = config
        self.placement = place = Placement(rank, world_size, expert_parallel, **placement)
        self.rank, self.ranks = place.tensor
        self.heads = self.share("num_attention_heads", config.heads, self.ranks)
        # Fewer key heads than ranks: each head is held by several ranks.
        self.kv_heads = max(1, config.kv_heads // self.ranks)
        if config.kv_heads % self.ranks and self.ranks % config.kv_heads:
            raise ValueError(
                f"world_size is {self.ranks}, wanted a divisor or a multiple of {config.kv_heads} key heads"
            )
        self.kv_first = self.rank * config.kv_heads // self.ranks
        self.linear = None if config.linear is None else linear_attention.share(self, config.linear)
        self.vocabulary = self.shares(self.rank)
        if not self.shares(self.ranks - 1):
            raise ValueError(f"vocab_size is {config.vocab_size}, wanted some tokens for each of {self.ranks} ranks")
        self.held = place.held(config.num_experts)  # experts, in the order of their local numbers
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, Piece] = {config.released(name): piece for name, piece in self._pieces()}
        # Some released checkpoints hold the head although it is the embedding; then both have to be equal.
        head, embedding = config.released("lm_head.weight"), config.released("model.embed_tokens.weight")
        self.copies: dict[str, str] = {head: embedding} if config.tied else {}

    def shares(self, rank: int) -> range:
        """The tokens whose rows `rank` of those that share the vocabulary holds."""
        return self.placement.vocabulary(self.config.vocab_size, rank)

    def empty(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """New parameters, poisoned with NaN: what is never written shows."""
        nan = float("nan")
        return {name: torch.full(shape, nan, dtype=dtype, device=device) for name, shape in self.shapes.items()}

    def share(self, key: str, size: int, ranks: int) -> int:
        """What each of `ranks` holds of the size `key` of the config; ValueError where they cannot share it."""
        if size % ranks:
            raise ValueError(
                f"{key} is {size}, wanted a multiple of the {ranks} ranks that share it; use another number of ranks"
                + (", or expert_parallel=True" if key == "moe_intermediate_size" else "")
            )
        return size // ranks

    def _pieces(self) -> Iterator[tuple[str, Piece]]:
        c = self.config
        yield self._of_vocabulary("model.embed_tokens.weight")
        for i in range(c.layers):
            layer = f"model.layers.{i}"
            if c.linear is not None and i in c.linear.layers:
                yield from linear_attention.pieces(self, i)
            else:
                yield from latent.pieces(self, layer) if c.latent else self._attention(layer)
            yield from self._sparse(i) if i in c.sparse_layers else self._dense(i)
        yield self.whole("model.norm.weight", c.hidden_size)
        if not c.tied:
            yield self._of_vocabulary("lm_head.weight")

    def whole(self, name: str, *shape: int) -> tuple[str, Piece]:
        """A tensor that every rank has."""
        self.shapes[name] = shape
        return name, Piece(shape, name)

    def _of_vocabulary(self, name: str) -> tuple[str, Piece]:
        c, own = self.config, self.vocabulary
        self.shapes[name] = (len(own), c.hidden_size)
        return name, Piece((c.vocab_size, c.hidden_size), name, (), Cut(0, own.start, len(own)))

    def _attention(self, layer: str) -> Iterator[tuple[str, Piece]]:
        c, d, attention = self.config, self.config.head_dim, f"{layer}.self_attn"
        yield self.whole(f"{layer}.input_layernorm.weight", c.hidden_size)
        yield self.whole(f"{layer}.post_attention_layernorm.weight", c.hidden_size)
        wide = 2 * d if c.linear is not None else d  # of a query head: behind it stands its gate
        rows = self.heads * wide + 2 * self.kv_heads * d
        kinds: list[tuple[str, tuple[int, ...]]] = [("weight", (c.hidden_size,))]
        kinds += [("bias", ())] if c.qkv_bias else []
        for kind, behind in kinds:
            name, at = f"{attention}.qkv_proj.{kind}", 0
            self.shapes[name] = (rows, *behind)
            for part, width, total, first, held in (
                ("q", wide, c.heads, self.rank * self.heads, self.heads),
                ("k", d, c.kv_heads, self.kv_first, self.kv_heads),
                ("v", d, c.kv_heads, self.kv_first, self.kv_heads),
            ):
                cut = Cut(0, first * width, held * width)
                to = (slice(at, at + held * width),)
                yield f"{attention}.{part}_proj.{kind}", Piece((total * width, *behind), name, to, cut)
                at += held * width
        output = f"{attention}.o_proj.weight"
        self.shapes[output] = (c.hidden_size, self.heads * d)
        cut = Cut(1, self.rank * self.heads * d, self.heads * d)
        yield output, Piece((c.hidden_size, c.heads * d), output, (), cut)
        if c.output_bias:  # added once, by the first rank
            name = f"{attention}.o_proj.bias"
            self.shapes |= {name: (c.hidden_size,)} if self.rank == 0 else {}
            yield name, Piece((c.hidden_size,), name if self.rank == 0 else None)
        if c.qk_norm:
            yield self.whole(f"{attention}.q_norm.weight", d)
            yield self.whole(f"{attention}.k_norm.weight", d)

    def _dense(self, i: int) -> Iterator[tuple[str, Piece]]:
        key = "intermediate_size"
        return self._gated(f"model.layers.{i}.mlp", key, self.config.intermediate_size, self.placement.tensor)

    def _gated(self, mlp: str, key: str, total: int, place: tuple[int, int]) -> Iterator[tuple[str, Piece]]:
        """A gated mlp cut over `place`: this rank's number among those that share it, and how many those are."""
        hidden, held = self.config.hidden_size, self.share(key, total, place[1])
        first, name = place[0] * held, f"{mlp}.gate_up_proj.weight"
        self.shapes[name] = (2 * held, hidden)
        self.shapes[f"{mlp}.down_proj.weight"] = (hidden, held)
        for at, part in ((0, "gate"), (held, "up")):
            yield (
                f"{mlp}.{part}_proj.weight",
                Piece((total, hidden), name, (slice(at, at + held),), Cut(0, first, held)),
            )
        down = f"{mlp}.down_proj.weight"
        yield down, Piece((hidden, total), down, (), Cut(1, first, held))

    def _sparse(self, i: int) -> Iterator[tuple[str, Piece]]:
        c, mlp = self.config, f"model.layers.{i}.mlp"
        yield self.whole(f"{mlp}.gate.weight", c.num_experts, c.hidden_size)
        number, ranks = self.placement.columns
        held = self.share("moe_intermediate_size", c.expert_size, ranks)
        first = number * held
        up, down = f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj"
        self.shapes[up] = (len(self.held), 2 * held, c.hidden_size)
        self.shapes[down] = (len(self.held), c.hidden_size, held)
        locals_of = {expert: local for local, expert in enumerate(self.held)}
        for e in range(c.num_experts):
            local, expert = locals_of.get(e, 0), f"{mlp}.experts.{e}"
            here = e in locals_of
            for at, part in ((0, "gate"), (held, "up")):
                place = (local, slice(at, at + held)) if here else ()
                yield (
                    f"{expert}.{part}_proj.weight",
                    Piece((c.expert_size, c.hidden_size), up if here else None, place, Cut(0, first, held)),
                )
            whole: tuple[int | slice, ...] = (local,) if here else ()
            yield (
                f"{expert}.down_proj.weight",
                Piece((c.hidden_size, c.expert_size), down if here else None, whole, Cut(1, first, held)),
            )
        if c.shared_expert_size:
            key = "shared_expert_intermediate_size"
            shared = f"{mlp}.{c.shared_expert}"
            yield from self._gated(shared, key, c.shared_expert_size, self.placement.shared_expert)
            if c.shared_gate:
                yield self.whole(f"{mlp}.shared_expert_gate.weight", 1, c.hidden_size)
