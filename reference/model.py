r"""Whole decoders: Qwen3-MoE, Qwen2-MoE, Qwen3-Next, the Qwen3-Omni talker, DeepSeek-V2, and dense Qwen3, the control.

    h_0     = embed_tokens[ids]                                                    [B, L, H]
    a_i     = h_i + attention_i(norm(h_i))                                         half layer "attention"
    h_{i+1} = a_i + mlp_i(norm(a_i))                                               half layer "mlp"
    logits  = lm_head @ norm(h_n)                                                  [B, L, V]

All arithmetic is done in the dtype of the hidden states, so pass fp64 for an oracle; weights may have any dtype.  The
reading of record is transformers 5.17.  Every value that an implementation may store in the model's dtype goes through
`State.store` under its name, where the error model of the harness adds its noise.

Left out is what stands around the decoder of the Omni talker: projections of the thinker's states, the code predictor.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.reference import moe_block
from moe_harness.reference.attention import Attention, GroupedQuery, Latent
from moe_harness.reference.delta_net import DeltaNet
from moe_harness.reference.experts import routed_rows
from moe_harness.reference.layers import STORES, Parts, Routing, State, keep

__all__ = ["DEFAULTS", "HALVES", "STORES", "Model", "Routing", "State", "keep"]

TALKER = "qwen3_omni_moe_talker_text"
SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": (), "rms_norm_eps": 1e-6}
# transformers' defaults of keys that a config may lack.  Qwen2-MoE has no norm of q and k, and biases on q, k and v.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"attention_bias": False, **SPARSE},
    "qwen2_moe": {"qkv_bias": True, **SPARSE},
    "qwen3": {"attention_bias": False, "rms_norm_eps": 1e-6},
    "qwen3_next": {
        "attention_bias": False, "partial_rotary_factor": 0.25, "full_attention_interval": 4, **SPARSE,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    },
    TALKER: {"attention_bias": False, "rms_norm_eps": 1e-6},
    "deepseek_v2": {"first_k_dense_replace": 0, "rms_norm_eps": 1e-6, "moe_layer_freq": 1, "scoring_func": "softmax"},
}  # fmt: skip
HALVES = ("attention", "mlp")


def decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the decoder: those of the talker's text model in the config of a whole Qwen3-Omni.

    Raises:
        ValueError: unknown model_type; a key of DeepSeek-V2's that no released model sets.
    """
    if config.get("model_type") == "qwen3_omni_moe":
        config = config.get("talker_config", {}).get("text_config", {})
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(f"model_type is {kind!r}, but should be one of {', '.join(DEFAULTS)}")
    keys = {**DEFAULTS[kind], **config}
    if kind == "deepseek_v2":
        for key, wanted in (("moe_layer_freq", 1), ("scoring_func", "softmax"), ("mlp_bias", False)):
            if keys.get(key, wanted) != wanted:
                raise ValueError(f"{key} is {keys[key]!r}, but should be {wanted!r}")
        keys["num_experts"] = keys["n_routed_experts"]
    return keys


class Named(Mapping[str, Tensor]):
    """A checkpoint's tensors by the names of a decoder alone; what belongs to other parts of the model is not seen.

    The talker lies in the checkpoint of a whole Qwen3-Omni under `talker.`, with `codec_embedding` and `codec_head`.
    """

    def __init__(self, weights: Mapping[str, Tensor], model_type: str):
        self.weights, self.released = weights, {name: name for name in weights}
        if model_type == TALKER:
            plain = {name.removeprefix("talker."): name for name in weights}
            plain = {name.replace("model.codec_embedding.", "model.embed_tokens."): at for name, at in plain.items()}
            plain = {name.replace("codec_head.", "lm_head."): at for name, at in plain.items()}
            self.released = {name: at for name, at in plain.items() if name.startswith(("model.", "lm_head."))}

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.released[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.released)

    def __len__(self) -> int:
        return len(self.released)


class Model:
    """A decoder over the checkpoint's own tensors.

    Args:
        config: the keys of config.json, `model_type` among them.
        weights: the checkpoint's names, each expert by itself as released
            (`model.layers.0.mlp.experts.3.gate_proj.weight`, [I, H]).

    Raises:
        ValueError: unknown model_type, rotary angles that the family does not have.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]):
        self.config = decoder_config(config)
        kind = self.config["model_type"]
        self.weights = Named(weights, kind)
        self.layers: int = self.config["num_hidden_layers"]
        act, excess = moe_block.activation(self.config), kind == "qwen3_next"
        self.parts = Parts(self.weights, self.config["rms_norm_eps"], act, excess)
        self.attend: Attention = (
            Latent(self.config, self.parts) if kind == "deepseek_v2" else GroupedQuery(self.config, self.parts, excess)
        )
        self.head_dim = self.attend.head_dim

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
        normed = self.parts.norm(hidden, "model.norm", state)
        return state.store("logits", F.linear(normed, head.to(hidden.dtype)))

    def attention(self, i: int, hidden: Tensor, state: State) -> Tensor:
        """The first half of layer i: [B, L, H] -> [B, L, H], residual included; extends state.past[i]."""
        x = self.parts.norm(hidden, f"model.layers.{i}.input_layernorm", state)
        mix = self.attend if self.attends(i) else DeltaNet(self.config, self.parts)
        return state.store("residual", hidden + mix(i, x, state))

    def attends(self, i: int) -> bool:
        """Whether layer i has softmax attention, and no gated delta net."""
        interval = self.config.get("full_attention_interval")
        kinds = self.config.get("layer_types") if interval else None
        if kinds is not None:
            return kinds[i] in ("full_attention", "attention")
        return interval is None or (i + 1) % interval == 0

    def mlp(self, i: int, hidden: Tensor, state: State) -> Tensor:
        """The second half of layer i: [B, L, H] -> [B, L, H], residual included; leaves state.routed[i]."""
        name = f"model.layers.{i}"
        x = self.parts.norm(hidden, f"{name}.post_attention_layernorm", state)
        rows = x.flatten(0, 1)
        output = self._sparse(i, rows, state) if self.sparse(i) else self.parts.gated(rows, f"{name}.mlp", state)
        return state.store("residual", hidden + state.store("mlp_output", output).view_as(hidden))

    def sparse(self, i: int) -> bool:
        """Whether layer i has experts.  Every layer of the talker has, whatever mlp_only_layers says."""
        keys, kind = self.config, self.config["model_type"]
        if not keys.get("num_experts"):
            return False
        if kind == "deepseek_v2":
            return i >= keys["first_k_dense_replace"]
        return kind == TALKER or (
            i not in (keys["mlp_only_layers"] or ()) and (i + 1) % keys["decoder_sparse_step"] == 0
        )

    def _sparse(self, i: int, rows: Tensor, state: State) -> Tensor:
        """Routed experts, and the shared one where the family has it: [T, H] -> [T, H]."""
        name, parts = f"model.layers.{i}.mlp", self.parts
        logits = parts.linear(rows, f"{name}.gate")
        if i in state.forced:
            weights, ids = state.forced[i]
        else:
            weights, ids = moe_block.routing(logits, {}, self.config)
        state.routed[i] = (logits, weights, ids)
        weights = state.store("routing_weight", weights)
        out = torch.zeros_like(rows)
        for expert, tokens, slots in routed_rows(ids):
            output = state.store("expert_output", parts.gated(rows[tokens], f"{name}.experts.{expert}", state))
            weighted = state.store("weighted", weights[tokens, slots, None].to(rows.dtype) * output)
            out[tokens] = state.store("partial_sum", out[tokens] + weighted)
        if f"{name}.shared_experts.down_proj.weight" in self.weights:  # DeepSeek: several merged in one, no gate
            return out + state.store("weighted", parts.gated(rows, f"{name}.shared_experts", state))
        if f"{name}.shared_expert_gate.weight" not in self.weights:
            return out
        gate = torch.sigmoid(parts.linear(rows, f"{name}.shared_expert_gate"))
        return out + state.store("weighted", gate * parts.gated(rows, f"{name}.shared_expert", state))
