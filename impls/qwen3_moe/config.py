"""What config.json says about a model, checked: a key this engine would have to ignore is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class CheckpointError(ValueError):
    """A folder that cannot be loaded; the message says the file, the key, what was got and what was wanted."""


@dataclass(frozen=True)
class Config:
    """One model.  Sizes are of the whole model, whatever the number of ranks."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int  # of a dense layer, 0 where there is none
    num_experts: int  # 0 in a dense model
    top_k: int
    expert_size: int  # intermediate size of one expert
    shared_expert_size: int  # 0 where there is no shared expert
    renormalize: bool
    sparse_layers: frozenset[int]
    activation: str
    eps: float
    theta: float
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    stop_ids: frozenset[int]

    @classmethod
    def read(cls, folder: Path) -> "Config":
        """The config of the model in `folder`.

        Raises:
            CheckpointError: no folder, no config.json or not JSON; an architecture, activation, rotary scaling,
                quantisation or window that this engine does not have; a key that is missing or has no sensible value.
        """
        file = Path(folder) / "config.json"
        if not file.is_file():
            near = sorted(path.name for path in Path(folder).glob("*"))[:5] if Path(folder).is_dir() else None
            what = "the folder does not exist" if near is None else f"it holds {', '.join(near) or 'nothing'}"
            raise CheckpointError(f"{folder}: got no config.json ({what}), wanted a Hugging Face model folder")
        try:
            keys = json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: got {error}, wanted JSON") from error
        if not isinstance(keys, dict):
            raise CheckpointError(f"{file}: got a {type(keys).__name__}, wanted an object of keys")
        return _Reader(file, keys).config()


class _Reader:
    """Reads keys and complains with the name of the file."""

    def __init__(self, file: Path, keys: dict[str, Any]):
        self.file, self.keys = file, keys

    def config(self) -> Config:
        kind = self._choice("model_type", ARCHITECTURES)
        self._refuse_what_is_lacking()
        hidden, heads, layers = (
            self._size("hidden_size"),
            self._size("num_attention_heads"),
            self._size("num_hidden_layers"),
        )
        kv_heads = self._size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._error("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
        experts = 0 if kind == "qwen3" else self._size("num_experts")
        sparse = self._sparse(layers) if experts else frozenset()
        top_k = self._size("num_experts_per_tok", {"qwen2_moe": 4, "qwen3_moe": 8}[kind]) if experts else 0
        if top_k > experts:
            raise self._error("num_experts_per_tok", top_k, f"at most num_experts = {experts}")
        bias = bool(self.keys.get("attention_bias", False))
        return Config(
            model_type=kind,
            vocab_size=self._size("vocab_size"),
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self._size("head_dim", hidden // heads),
            intermediate_size=self._size("intermediate_size") if len(sparse) < layers else 0,
            num_experts=experts,
            top_k=top_k,
            expert_size=self._size("moe_intermediate_size") if sparse else 0,
            shared_expert_size=self._size("shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
            renormalize=bool(self.keys.get("norm_topk_prob", False)),  # False is the default of both classes
            sparse_layers=sparse,
            activation=ACTIVATIONS[self._choice("hidden_act", ACTIVATIONS, "silu")],
            eps=float(self.keys.get("rms_norm_eps", 1e-6)),
            theta=self._theta(),
            qkv_bias=bool(self.keys.get("qkv_bias", True)) if kind == "qwen2_moe" else bias,
            output_bias=bias and kind != "qwen2_moe",
            qk_norm=kind != "qwen2_moe",
            tied=bool(self.keys.get("tie_word_embeddings", False)),
            max_positions=self._size("max_position_embeddings", 32768),
            stop_ids=self._stop_ids(),
        )

    def _error(self, key: str, got: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {key} is {got!r}, wanted {wanted}")

    def _choice(self, key: str, known: dict[str, str], default: str | None = None) -> str:
        value = self.keys.get(key, default)
        if value not in known:
            raise self._error(key, value, f"one of {', '.join(known)}")
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.keys.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, value, "a positive whole number")
        return value

    def _refuse_what_is_lacking(self) -> None:
        for key in ("quantization_config", "compression_config"):
            if self.keys.get(key):
                kind = self.keys[key].get("quant_method") if isinstance(self.keys[key], dict) else self.keys[key]
                raise self._error(key, kind, "none: weights in bf16, fp16 or fp32")
        if self.keys.get("use_sliding_window"):
            raise self._error("use_sliding_window", True, "false: every layer attends to all positions")

    def _theta(self) -> float:
        """transformers 5 writes rope_parameters, the released configs rope_theta and rope_scaling."""
        for key in ("rope_parameters", "rope_scaling"):
            parameters = self.keys.get(key) or {}
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind != "default":
                raise self._error(key, kind, "no scaling of rotary angles (null, or rope_type 'default')")
        return float((self.keys.get("rope_parameters") or {}).get("rope_theta", self.keys.get("rope_theta", 10000.0)))

    def _sparse(self, layers: int) -> frozenset[int]:
        dense, step = self.keys.get("mlp_only_layers") or [], self._size("decoder_sparse_step", 1)
        return frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0)

    def _stop_ids(self) -> frozenset[int]:
        """End-of-sequence ids of generation_config.json, which may list several, and of config.json."""
        found = [self.keys.get("eos_token_id")]
        generation = self.file.with_name("generation_config.json")
        if generation.is_file():
            try:
                found.append(json.loads(generation.read_text()).get("eos_token_id"))
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
                raise CheckpointError(f"{generation}: got {error}, wanted a JSON object") from error
        return frozenset(i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None)
