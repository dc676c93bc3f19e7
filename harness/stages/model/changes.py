"""What a decoder may do instead of what it should: the reference, wrong in one thing, by half layer and stage.

A change builds the changed reference of a config and its weights, and raises KeyError where these have nothing of the
kind.  It is of every layer; `causes.Partly` takes it for some of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_harness.reference import moe_block
from moe_harness.reference.layers import Attend, Parts, Rotate, State, Turn, attend, rotate_halves
from moe_harness.reference.model import Model

Weights = dict[str, Tensor]
Change = Callable[[dict[str, Any], Weights], Model]


# ------------------------------------------------------------------------------------------------- weights and configs


def _weights(edit: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> Change:
    """Of every tensor its name and value, None: it is left out."""

    def change(config: dict[str, Any], held: Weights) -> Model:
        edited = {name: edit(name, weight) for name, weight in held.items()}
        if all(new is not None and new[0] == n and new[1] is held[n] for n, new in edited.items()):
            raise KeyError("no tensor of the kind")
        return Model(config, dict(filter(None, edited.values())))

    return change


def _swapped(first: str, second: str) -> Change:
    rename = {first: second, second: first}
    return _weights(lambda name, w: (next((name.replace(a, b) for a, b in rename.items() if a in name), name), w))


def _valued(part: str, value: Callable[[Tensor], Tensor]) -> Change:
    return _weights(lambda name, w: (name, value(w) if part in name else w))


def _without(*parts: str) -> Change:
    return _weights(lambda name, w: None if any(part in name for part in parts) else (name, w))


def _ungated(config: dict[str, Any], held: Weights) -> Model:
    """sigmoid(40) is 1 within fp64's roundings of it."""
    gates = {name: w for name, w in held.items() if ".shared_expert_gate.weight" in name}
    if not gates:
        raise KeyError("no gate of a shared expert")
    open_wide = {name.replace(".weight", ".bias"): w.new_full((len(w),), 40.0) for name, w in gates.items()}
    return Model(config, held | {name: torch.zeros_like(w) for name, w in gates.items()} | open_wide)


def _shifted_experts(step: int) -> Change:
    def change(config: dict[str, Any], held: Weights) -> Model:
        experts = config.get("num_experts") or config["n_routed_experts"]

        def moved(name: str) -> str:
            before, _, after = name.partition(".experts.")
            number, _, rest = after.partition(".")
            return f"{before}.experts.{(int(number) + step) % experts}.{rest}" if after else name

        return Model(config, {moved(name): w for name, w in held.items()})

    return change


def _always(value: Any, _: Any) -> Any:
    return value


def _keys(**changes: Callable[[Any], Any]) -> Change:
    return lambda config, held: Model(config | {key: change(config[key]) for key, change in changes.items()}, held)


# ------------------------------------------------------------------------------------------------ steps of a half layer


def _parts(change: Callable[[Parts], Parts]) -> Change:
    def build(config: dict[str, Any], held: Weights) -> Model:
        model = Model(config, held)
        model.parts = model.attend.parts = change(model.parts)
        return model

    return build


@dataclass(frozen=True)
class _Unnormed(Parts):
    """Without the norms whose name ends so."""

    skipped: str = ""

    def norm(self, x: Tensor, name: str, state: State, eps: float | None = None) -> Tensor:
        return x if name.endswith(self.skipped) else super().norm(x, name, state, eps)


def _unnormed(name: str) -> Change:
    return _parts(lambda parts: _Unnormed(parts.weights, parts.eps, parts.activation, parts.excess, name))


def _rotated(rotate: Callable[[Model], Rotate]) -> Change:
    def build(config: dict[str, Any], held: Weights) -> Model:
        model = Model(config, held)
        model.attend.rotate = rotate(model)
        return model

    return build


def _backwards(model: Model) -> Rotate:
    right = model.attend.rotate
    return lambda x, angles, state: right(x, (angles[0], -angles[1]), state)


def _of_other_pairs(model: Model) -> Rotate:
    """Element i with its neighbour where it should be with i + D / 2, and the other way round."""
    if model.attend.rotate is not rotate_halves:
        return rotate_halves

    def rotate(x: Tensor, angles: Turn, state: State) -> Tensor:
        width = 2 * angles[0].shape[-1]
        even, odd = x[..., :width:2], x[..., 1:width:2]
        turned = torch.stack((even * angles[0] - odd * angles[1], odd * angles[0] + even * angles[1]), -1).flatten(-2)
        return torch.cat((turned, x[..., width:]), -1)

    return rotate


def _of_one_side(queries: bool) -> Callable[[Model], Rotate]:
    """Told apart by the number of heads."""

    def only(model: Model) -> Rotate:
        keys, right = model.config, model.attend.rotate
        heads = keys["num_attention_heads"]
        if heads == keys["num_key_value_heads"] and "kv_lora_rank" not in keys:
            raise KeyError("as many heads of keys as of queries")
        return lambda x, angles, state: right(x, angles, state) if (x.shape[2] == heads) == queries else x

    return only


def _attending(attending: Callable[[dict[str, Any]], Attend]) -> Change:
    def build(config: dict[str, Any], held: Weights) -> Model:
        model = Model(config, held)
        model.attend.attend = attending(config)
        return model

    return build


def _seeing(more: int | None) -> Attend:
    """Queries see so many keys more than the causal mask lets them; all with None."""

    def attending(q: Tensor, k: Tensor, v: Tensor, scale: float, state: State) -> Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = q @ k.transpose(-1, -2) * scale
        if more is not None:
            queries, keys = scores.shape[-2:]
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1 + more)
            scores = scores.masked_fill(hidden, float("-inf"))
        return (state.store("probabilities", scores.softmax(-1)) @ v).transpose(1, 2)

    return attending


def _scaled(by: Callable[[float, dict[str, Any]], float]) -> Callable[[dict[str, Any]], Attend]:
    return lambda config: lambda q, k, v, scale, state: attend(q, k, v, by(scale, config), state)


def _dealt(config: dict[str, Any]) -> Attend:
    """Query head h reads head h % Hk of keys and values."""
    if config["num_attention_heads"] == config["num_key_value_heads"] or config["num_key_value_heads"] == 1:
        raise KeyError("no groups of query heads")

    def attending(q: Tensor, k: Tensor, v: Tensor, scale: float, state: State) -> Tensor:
        group = q.shape[2] // k.shape[2]
        return attend(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1), scale, state)

    return attending


class _NoResidual(Model):
    without = "attention"

    def attention(self, i: int, hidden: Tensor, state: State) -> Tensor:
        return super().attention(i, hidden, state) - (hidden if self.without == "attention" else 0)

    def mlp(self, i: int, hidden: Tensor, state: State) -> Tensor:
        return super().mlp(i, hidden, state) - (hidden if self.without == "mlp" else 0)


class _NoResidualOfMlp(_NoResidual):
    without = "mlp"


class _SideBySide(Model):
    def layer(self, i: int, hidden: Tensor, state: State) -> Tensor:
        return self.attention(i, hidden, state) + self.mlp(i, hidden, state) - hidden


def _rerouted(rule: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Change:
    """Weights and ids [T, k] of logits [T, E] and the right ones."""

    class Rerouted(Model):
        def _sparse(self, i: int, rows: Tensor, state: State) -> Tensor:
            if i in state.forced:
                return super()._sparse(i, rows, state)
            logits = self.parts.linear(rows, f"model.layers.{i}.mlp.gate")
            routed = rule(logits, *moe_block.routing(logits, {}, self.config))
            return super()._sparse(i, rows, State(state.past, {i: routed}, state.routed, state.store))

    def build(config: dict[str, Any], held: Weights) -> Model:
        if not any(".mlp.gate.weight" in name for name in held):
            raise KeyError("no router")
        return Rerouted(config, held)

    return build


def _sigmoids(logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid().gather(-1, ids)
    return scores, ids


def _smallest(logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    chosen = (-logits).topk(ids.shape[-1]).indices
    return weights, chosen


# -------------------------------------------------------------------------------------------------- around the layers


def _tied(config: dict[str, Any], held: Weights) -> Model:
    if config.get("tie_word_embeddings") or "model.embed_tokens.weight" not in held:
        raise KeyError("tied as they should be")
    return Model(config | {"tie_word_embeddings": True}, held)


class _EmbeddingScaled(Model):
    def embed(self, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return super().embed(ids, dtype) * self.config["hidden_size"] ** 0.5


class _FewerLayers(Model):
    left_out = 0

    def layer(self, i: int, hidden: Tensor, state: State) -> Tensor:
        return hidden if i == self.left_out % self.layers else super().layer(i, hidden, state)


class _WithoutTheLast(_FewerLayers):
    left_out = -1


class _OtherOrder(Model):
    def layer(self, i: int, hidden: Tensor, state: State) -> Tensor:
        return super().layer(self.layers - 1 - i, hidden, state)


def _answering(answer: Callable[[Tensor], Tensor]) -> Change:
    class Answering(Model):
        def logits(self, hidden: Tensor, state: State) -> Tensor:
            return answer(super().logits(hidden, state))

    return Answering


# Half layer, stage, and what is done instead.
IN_LAYERS: dict[str, Change] = {
    "attention: the residual is not added": _NoResidual,
    "attention: input norm: left out": _unnormed(".input_layernorm"),
    "attention: input norm: its weight is taken as 1": _valued(".input_layernorm.", torch.ones_like),
    "attention: input norm: the weight of the mlp's norm": _swapped(".input_layernorm.", ".post_attention_layernorm."),
    "attention: qkv: q's and k's norms swapped": _swapped(".q_norm.", ".k_norm."),
    "attention: qkv: q and k are not normalised": _without(".q_norm.", ".k_norm."),
    "attention: qkv: weights of q's and k's norms are taken as 1": _weights(
        lambda name, w: (name, torch.ones_like(w) if ".q_norm." in name or ".k_norm." in name else w)
    ),
    "attention: qkv: k and v swapped": _swapped(".k_proj.", ".v_proj."),
    "attention: qkv: biases left out": _without("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    "attention: rope: left out": _rotated(lambda model: lambda x, angles, state: x),
    "attention: rope: of queries alone": _rotated(_of_one_side(True)),
    "attention: rope: of keys alone": _rotated(_of_one_side(False)),
    "attention: rope: turned backwards": _rotated(_backwards),
    "attention: rope: halves for neighbours, or the other way round": _rotated(_of_other_pairs),
    **{
        f"attention: rope: theta {theta}": _keys(rope_theta=partial(_always, float(theta)))
        for theta in (10_000, 500_000, 1_000_000, 5_000_000, 10_000_000)
    },
    "attention: rope: yarn's scaling left out": _keys(rope_scaling=lambda scaling: None),
    "attention: latent: its norm's weight is taken as 1": _valued(".kv_a_layernorm.", torch.ones_like),
    "attention: latent: its norm left out": _unnormed(".kv_a_layernorm"),
    "attention: scores are not scaled": _attending(_scaled(lambda scale, config: 1.0)),
    "attention: scores are scaled by 1 / sqrt(hidden_size)": _attending(
        _scaled(lambda scale, config: config["hidden_size"] ** -0.5)
    ),
    "attention: scores are scaled twice": _attending(_scaled(lambda scale, config: scale**2)),
    "attention: yarn's sharper scores left out": _attending(
        _scaled(lambda scale, config: (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5)
    ),
    "attention: no causal mask": _attending(lambda config: _seeing(None)),
    "attention: the causal mask lets the next position in": _attending(lambda config: _seeing(1)),
    "attention: query head h reads kv head h % num_key_value_heads": _attending(_dealt),
    "attention: o_proj: nothing is added": _valued(".o_proj.", torch.zeros_like),
    "mlp: the residual is not added": _NoResidualOfMlp,
    "mlp: reads what attention read, not what it left": _SideBySide,
    "mlp: norm: left out": _unnormed(".post_attention_layernorm"),
    "mlp: norm: its weight is taken as 1": _valued(".post_attention_layernorm.", torch.ones_like),
    "mlp: router: renormalised where it should not be, or the other way round": _keys(norm_topk_prob=lambda b: not b),
    "mlp: router: one expert too few": _keys(num_experts_per_tok=lambda k: k - 1),
    "mlp: router: one expert too many": _keys(num_experts_per_tok=lambda k: k + 1),
    "mlp: router: weights in the reverse order": _rerouted(lambda logits, weights, ids: (weights.flip(-1), ids)),
    "mlp: router: the weights are left out": _rerouted(lambda logits, weights, ids: (torch.ones_like(weights), ids)),
    "mlp: router: all weights are 1 / top_k": _rerouted(
        lambda logits, weights, ids: (torch.full_like(weights, 1 / weights.shape[-1]), ids)
    ),
    "mlp: router: sigmoid for softmax": _rerouted(_sigmoids),
    "mlp: router: the smallest logits are chosen": _rerouted(_smallest),
    "mlp: router: the limit of groups ignored": _keys(topk_method=lambda method: "greedy"),
    "mlp: router: routed_scaling_factor left out": _keys(routed_scaling_factor=lambda factor: 1.0),
    "mlp: experts: gate and up swapped": _swapped(".gate_proj.", ".up_proj."),
    "mlp: experts: the first two swapped": _swapped(".experts.0.", ".experts.1."),
    "mlp: experts: each is the one before": _shifted_experts(1),
    "mlp: experts: each is the one behind": _shifted_experts(-1),
    "mlp: experts: gelu for silu": _keys(hidden_act=lambda act: "gelu_pytorch_tanh"),
    "mlp: experts: nothing is added": _valued(".experts.", torch.zeros_like),
    "mlp: shared expert: left out": _without(".shared_expert"),
    "mlp: shared expert: added twice": _weights(
        lambda name, w: (name, 2 * w if ".shared_expert" in name and "down_proj" in name else w)
    ),
    "mlp: shared expert: its gate left out": _ungated,
    "mlp: shared expert: its gate is always one half": _valued(".shared_expert_gate.", torch.zeros_like),
    "norms: 1 + weight where it should be the weight, or the other way round": _parts(
        lambda parts: replace(parts, excess=not parts.excess)
    ),
    "norms: rms_norm_eps is 1e-5": _keys(rms_norm_eps=lambda eps: 1e-5),
}  # fmt: skip

# Of the whole model; no layer alone shows it.
AROUND: dict[str, Change] = {
    "the embedding is multiplied by sqrt(hidden_size)": _EmbeddingScaled,
    "the first layer is left out": _FewerLayers,
    "the last layer is left out": _WithoutTheLast,
    "the layers come in reverse": _OtherOrder,
    "the last norm is left out": _unnormed("model.norm"),
    "the last norm: its weight is taken as 1": _valued("model.norm.", torch.ones_like),
    "the head is the embedding, which the config does not tie": _tied,
    "logits come one position early: row i is of position i + 1": _answering(lambda logits: logits.roll(-1, 1)),
    "logits come one position late: row i is of position i - 1": _answering(lambda logits: logits.roll(1, 1)),
    "logits are probabilities": _answering(lambda logits: logits.softmax(-1)),
    "logits are log-probabilities": _answering(lambda logits: logits.log_softmax(-1)),
    "prompts are in reverse order": _answering(lambda logits: logits.flip(0)),
    "every prompt gets the logits of the first": _answering(lambda logits: logits[:1].expand_as(logits)),
}  # fmt: skip
