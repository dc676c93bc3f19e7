r"""What decoders are made of: the state that a layer reads and leaves, norms, projections, rotations, attention.

    norm(x) = x / sqrt(mean(x^2) + eps) * weight                      (1 + weight where the family stores the excess)
    halves       (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)       Qwen: element i with element i + D / 2
    interleaved  the same of elements 2 i and 2 i + 1                 DeepSeek

Every value that an implementation may store in the model's dtype goes through `State.store` under its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.reference.experts import activate
from moe_harness.reference.rope import Rope

Routing = tuple[Tensor, Tensor]  # topk_weights and topk_ids, both [B * L, k]
Past = tuple[Tensor, Tensor]

# Where a value may be stored in the model's dtype ("angle": in fp32), in the order of the computation.
STORES = (
    "norm", "norm_scaled", "qkv", "angle", "cosine", "turned", "rotated", "probabilities", "convolved", "written",
    "attention", "gate", "attention_output", "residual", "gate_up", "activated", "activation", "expert_output",
    "routing_weight", "weighted", "partial_sum", "mlp_output", "logits",
)  # fmt: skip


def keep(name: str, value: Tensor) -> Tensor:
    """Nothing is rounded."""
    return value


@dataclass
class State:
    """What a layer needs beside its input, and what it leaves behind.

    Attributes:
        past: layer -> what attention kept of the positions before, both [B, L_past, ...], extended by every call: keys
            and values [Hk, D], or (DeepSeek) the compressed latent [R] and the turned part of the key [1, D_rope], or
            what linear attention goes on with, whose size does not grow.
        forced: layer -> topk_weights and topk_ids to use instead of the router's; a layer not in it routes freely.
        routed: layer -> router logits [B * L, E] and the routing that was used, as left by the last call.
        store: called with the name of a place (STORES) and its value; returns the value to go on with.
    """

    past: dict[int, Past] = field(default_factory=dict)
    forced: Mapping[int, Routing] = field(default_factory=dict)
    routed: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    store: Callable[[str, Tensor], Tensor] = keep

    def extend(self, i: int, new: Past) -> Past:
        """What layer i kept with `new` behind it, both [B, L, ...]."""
        if i in self.past:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.past[i], new, strict=True))  # type: ignore[assignment]
        self.past[i] = new
        return new

    def start(self, i: int) -> int:
        """How many positions layer i has seen."""
        return self.past[i][0].shape[1] if i in self.past else 0


@dataclass(frozen=True)
class Parts:
    """Computations on the weights of one checkpoint, by name.

    Attributes:
        activation: "silu" or "gelu_tanh".
        excess: norms store what exceeds 1 (Qwen3-Next).
    """

    weights: Mapping[str, Tensor]
    eps: float
    activation: str
    excess: bool = False

    def norm(self, x: Tensor, name: str, state: State, eps: float | None = None) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
        rows = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (self.eps if eps is None else eps))
        weight = self.weights[f"{name}.weight"].to(x.dtype) + float(self.excess)
        return state.store("norm_scaled", state.store("norm", rows) * weight)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """weight @ x, + bias where the checkpoint has one."""
        bias = self.weights.get(f"{name}.bias")
        return F.linear(x, self.weights[f"{name}.weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def gated(self, rows: Tensor, name: str, state: State) -> Tensor:
        """down @ (act(gate @ x) * (up @ x)): [n, H] -> [n, H]."""
        gate, up, down = (self.weights[f"{name}.{part}_proj.weight"].to(rows.dtype) for part in ("gate", "up", "down"))
        gate, up = (state.store("gate_up", F.linear(rows, weight)) for weight in (gate, up))
        activated = state.store("activated", activate(gate, self.activation))
        return F.linear(state.store("activation", activated * up), down)


Turn = tuple[Tensor, Tensor]
Rotate = Callable[[Tensor, Turn, State], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, float, State], Tensor]


def turn(rope: Rope, start: int, x: Tensor, state: State) -> Turn:
    """Cosine and sine at the positions `start` on of x [B, L, ...], both [L, 1, D / 2] in its dtype."""
    positions = torch.arange(start, start + x.shape[1], device=x.device).to(x.dtype)
    angle = state.store("angle", positions[:, None] * rope.frequencies(x.dtype, x.device))[..., None, :]
    cosine, sine = (state.store("cosine", of * rope.magnitude) for of in (angle.cos(), angle.sin()))
    return cosine, sine


def rotate_halves(x: Tensor, angles: Turn, state: State) -> Tensor:
    """x [B, L, heads, D_head] with the halves of its first D dimensions turned; the others stay as they are."""
    cosine, sine = angles
    width = 2 * cosine.shape[-1]
    first, second = x[..., :width].chunk(2, dim=-1)
    straight = state.store("turned", torch.cat((first * cosine, second * cosine), dim=-1))
    across = state.store("turned", torch.cat((-second * sine, first * sine), dim=-1))
    turned = state.store("rotated", straight + across)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def rotate_interleaved(x: Tensor, angles: Turn, state: State) -> Tensor:
    """x [B, L, heads, D] with each pair of neighbours turned."""
    cosine, sine = angles
    even, odd = x[..., 0::2], x[..., 1::2]
    straight = state.store("turned", torch.stack((even * cosine, odd * cosine), dim=-1))
    across = state.store("turned", torch.stack((-odd * sine, even * sine), dim=-1))
    return state.store("rotated", straight + across).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, state: State) -> Tensor:
    """Causal attention, aligned to the last key: [B, L, Hq, D_v].

    Args:
        q: [B, L, Hq, D].
        k, v: [B, L_all, Hk, D] and [B, L_all, Hk, D_v]; Hq / Hk query heads share one of them.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = q @ k.transpose(-1, -2) * scale
    queries, keys = scores.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    probabilities = state.store("probabilities", scores.masked_fill(later, float("-inf")).softmax(-1))
    return (probabilities @ v).transpose(1, 2)
