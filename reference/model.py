r"""Whole decoders of three families: Qwen3-MoE, Qwen2-MoE, and dense Qwen3, the control without experts.

    h_0     = embed_tokens[ids]                                                    [B, L, H]
    a_i     = h_i + attention_i(norm(h_i))                                         half layer "attention"
    h_{i+1} = a_i + mlp_i(norm(a_i))                                               half layer "mlp"
    logits  = lm_head @ norm(h_n)                                                  [B, L, V]

    norm(x) = x / sqrt(mean(x^2) + eps) * weight
    q, k    rotated by halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), angle = position * theta^(-2 j / D)

All arithmetic is done in the dtype of the hidden states, so pass fp64 for an oracle; weights may have any dtype.  The
reading of record is transformers 5.17.  Every value that an implementation may store in the model's dtype goes through
`State.store` under its name, where the error model of the harness adds its noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.reference import moe_block
from moe_harness.reference.experts import activate, routed_rows

Routing = tuple[Tensor, Tensor]  # topk_weights and topk_ids, both [B * L, k]

# transformers' defaults of keys that a config may lack.  Qwen2-MoE has no norm of q and k, and biases on q, k and v.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": (), "rms_norm_eps": 1e-6},
    "qwen2_moe": {"qkv_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": (), "rms_norm_eps": 1e-6},
    "qwen3": {"attention_bias": False, "rms_norm_eps": 1e-6},
}
HALVES = ("attention", "mlp")
# Where a value may be stored in the model's dtype ("angle": in fp32), in the order of the computation.
STORES = (
    "norm", "norm_scaled", "qkv", "angle", "cosine", "turned", "rotated", "probabilities", "attention",
    "attention_output", "residual", "gate_up", "activated", "activation", "expert_output", "routing_weight", "weighted",
    "partial_sum", "mlp_output", "logits",
)  # fmt: skip


def keep(name: str, value: Tensor) -> Tensor:
    """Nothing is rounded."""
    return value


@dataclass
class State:
    """What a layer needs beside its input, and what it leaves behind.

    Attributes:
        past: layer -> keys and values of the positions before, both [B, L_past, Hk, D]; extended by every call.
        forced: layer -> topk_weights and topk_ids to use instead of the router's; a layer not in it routes freely.
        routed: layer -> router logits [B * L, E] and the routing that was used, as left by the last call.
        store: called with the name of a place (STORES) and its value; returns the value to go on with.
    """

    past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    forced: Mapping[int, Routing] = field(default_factory=dict)
    routed: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    store: Callable[[str, Tensor], Tensor] = keep


def rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary angles, under the old key or the new one.

    Raises:
        ValueError: scaled rotary angles, which this model does not have.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}, but should be 'default'")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))


class Model:
    """A decoder over the checkpoint's own tensors.

    Args:
        config: the keys of config.json, `model_type` among them.
        weights: the checkpoint's names, each expert by itself as released
            (`model.layers.0.mlp.experts.3.gate_proj.weight`, [I, H]).

    Raises:
        ValueError: unknown model_type, scaled rotary angles.
    """

    def __init__(self, config: dict[str, Any], weights: Mapping[str, Tensor]):
        if config.get("model_type") not in DEFAULTS:
            raise ValueError(f"model_type is {config.get('model_type')!r}, but should be one of {', '.join(DEFAULTS)}")
        self.config = {**DEFAULTS[config["model_type"]], **config}
        self.weights = weights
        self.theta = rope_theta(config)
        self.layers: int = config["num_hidden_layers"]
        heads: int = config["num_attention_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // heads

    def __call__(self, ids: Tensor, state: State | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """Logits [B, L, V] in `dtype` of ids [B, L], which follow the positions that `state` holds already."""
        state = State() if state is None else state
        hidden = self.embed(ids, dtype)
        for i in range(self.layers):
            hidden = self.layer(i, hidden, state)
        return self.logits(hidden, state)

    def embed(self, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """[B, L] -> [B, L, H] in `dtype`."""
        return self.weights["model.embed_tokens.weight"][ids].to(dtype)

    def layer(self, i: int, hidden: Tensor, state: State) -> Tensor:
        """Layer i on the residual stream [B, L, H]: both halves."""
        return self.mlp(i, self.attention(i, hidden, state), state)

    def logits(self, hidden: Tensor, state: State) -> Tensor:
        """The last norm and the head, which is the embedding where the checkpoint ties them: [B, L, H] -> [B, L, V]."""
        tied = self.config.get("tie_word_embeddings", False)
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        normed = self._norm(hidden, "model.norm", state)
        return state.store("logits", F.linear(normed, head.to(hidden.dtype)))

    def attention(self, i: int, hidden: Tensor, state: State) -> Tensor:
        """The first half of layer i: [B, L, H] -> [B, L, H], residual included; extends state.past[i]."""
        name, (batch, length, _) = f"model.layers.{i}", hidden.shape
        x = self._norm(hidden, f"{name}.input_layernorm", state)
        q, k, v = (
            state.store("qkv", self._linear(x, f"{name}.self_attn.{p}_proj")).view(batch, length, -1, self.head_dim)
            for p in "qkv"
        )
        if f"{name}.self_attn.q_norm.weight" in self.weights:
            q = self._norm(q, f"{name}.self_attn.q_norm", state)
            k = self._norm(k, f"{name}.self_attn.k_norm", state)
        start = state.past[i][0].shape[1] if i in state.past else 0
        turn = self._turn(torch.arange(start, start + length, device=hidden.device), state, hidden.dtype)
        q, k = (self._rotate(x, *turn, state) for x in (q, k))
        if start:
            k, v = (torch.cat((old, new), dim=1) for old, new in zip(state.past[i], (k, v), strict=True))
        state.past[i] = (k, v)
        mixed = state.store("attention", self._attend(q, k, v, state).reshape(batch, length, -1))
        output = state.store("attention_output", self._linear(mixed, f"{name}.self_attn.o_proj"))
        return state.store("residual", hidden + output)

    def mlp(self, i: int, hidden: Tensor, state: State) -> Tensor:
        """The second half of layer i: [B, L, H] -> [B, L, H], residual included; leaves state.routed[i]."""
        name = f"model.layers.{i}"
        x = self._norm(hidden, f"{name}.post_attention_layernorm", state)
        rows = x.flatten(0, 1)
        output = self._sparse(i, rows, state) if self.sparse(i) else self._gated(rows, f"{name}.mlp", state)
        return state.store("residual", hidden + state.store("mlp_output", output).view_as(hidden))

    def sparse(self, i: int) -> bool:
        """Whether layer i has experts."""
        experts = self.config.get("num_experts") or 0
        return (
            experts > 0
            and i not in (self.config["mlp_only_layers"] or ())
            and (i + 1) % self.config["decoder_sparse_step"] == 0
        )

    def _norm(self, x: Tensor, name: str, state: State) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
        rows = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return state.store("norm_scaled", state.store("norm", rows) * self.weights[f"{name}.weight"].to(x.dtype))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return F.linear(x, self.weights[f"{name}.weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, state: State) -> Tensor:
        """x [B, L, heads, D] with its halves rotated; cosine and sine [L, 1, D / 2]."""
        first, second = x.chunk(2, dim=-1)
        straight = state.store("turned", torch.cat((first * cosine, second * cosine), dim=-1))
        across = state.store("turned", torch.cat((-second * sine, first * sine), dim=-1))
        return state.store("rotated", straight + across)

    def _turn(self, positions: Tensor, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles at `positions` [L], both [L, 1, D / 2]."""
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half, dtype=dtype, device=positions.device) / half)
        angle = state.store("angle", positions.to(dtype)[:, None] * frequency)[:, None, :]
        return state.store("cosine", angle.cos()), state.store("cosine", angle.sin())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """[B, L, Hq, D] of q [B, L, Hq, D] and k, v [B, L_all, Hk, D]: causal, aligned to the last key."""
        group = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        queries, keys = scores.shape[-2:]
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        probabilities = state.store("probabilities", scores.masked_fill(later, float("-inf")).softmax(-1))
        return (probabilities @ v).transpose(1, 2)

    def _sparse(self, i: int, rows: Tensor, state: State) -> Tensor:
        """Routed experts, and the shared one where the family has it: [T, H] -> [T, H]."""
        name = f"model.layers.{i}.mlp"
        logits = self._linear(rows, f"{name}.gate")
        if i in state.forced:
            weights, ids = state.forced[i]
        else:
            weights, ids = moe_block.routing(logits, {}, self.config)
        state.routed[i] = (logits, weights, ids)
        weights = state.store("routing_weight", weights)
        out = torch.zeros_like(rows)
        for expert, tokens, slots in routed_rows(ids):
            output = self._expert(rows[tokens], f"{name}.experts.{expert}", state)
            weighted = state.store("weighted", weights[tokens, slots, None].to(rows.dtype) * output)
            out[tokens] = state.store("partial_sum", out[tokens] + weighted)
        if f"{name}.shared_expert_gate.weight" not in self.weights:
            return out
        gate = torch.sigmoid(self._linear(rows, f"{name}.shared_expert_gate"))
        return out + state.store("weighted", gate * self._gated(rows, f"{name}.shared_expert", state))

    def _expert(self, rows: Tensor, name: str, state: State) -> Tensor:
        return state.store("expert_output", self._gated(rows, name, state))

    def _gated(self, rows: Tensor, name: str, state: State) -> Tensor:
        """down @ (act(gate @ x) * (up @ x)): [n, H] -> [n, H]."""
        gate, up, down = (self.weights[f"{name}.{part}_proj.weight"].to(rows.dtype) for part in ("gate", "up", "down"))
        gate, up = (state.store("gate_up", F.linear(rows, weight)) for weight in (gate, up))
        activated = state.store("activated", activate(gate, moe_block.activation(self.config)))
        return F.linear(state.store("activation", activated * up), down)
