"""What config.json says about a model, checked: a key this engine would have to ignore is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_harness.impls.qwen3_moe.rope import Angles, yarn

OMNI, TALKER, DEEPSEEK, NEXT = "qwen3_omni_moe", "qwen3_omni_moe_talker_text", "deepseek_v2", "qwen3_next"
ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3": "Qwen3ForCausalLM",
    TALKER: "Qwen3OmniMoeTalkerModel", DEEPSEEK: "DeepseekV2ForCausalLM",
    NEXT: "Qwen3NextForCausalLM",
}  # fmt: skip
GATED_SHARED = ("qwen2_moe", TALKER, NEXT)  # families whose shared expert has a gate
# transformers' class defaults; DeepSeek's has none
TOP_K = {"qwen2_moe": 4, "qwen3_moe": 8, TALKER: 8, NEXT: 10}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class CheckpointError(ValueError):
    """A folder that cannot be loaded; the message says the file, the key, what was got and what was wanted."""


@dataclass(frozen=True)
class Latent:
    """DeepSeek's attention over a compressed cache: dimensions of a head, and of what all heads share.

    Attributes:
        query_rank: of the queries' low rank; 0 where they come from the hidden states at once.
        rank: R, of the latent that keys and values come from.
        nope, turned, value: dimensions of a head's key without and with a rotation, and of its value.
    """

    query_rank: int
    rank: int
    nope: int
    turned: int
    value: int
    angles: Angles

    @property
    def query(self) -> int:
        """Width of a query head."""
        return self.nope + self.turned


@dataclass(frozen=True)
class Linear:
    """Qwen3-Next's attention: which layers are gated delta nets, their sizes, and what the others rotate.

    Attributes:
        key, value: dimensions of a head's key and of its value.
        kernel: positions that the convolution sees.
        turned: dimensions of a head of the other layers that are rotated.
    """

    layers: frozenset[int]
    key_heads: int
    value_heads: int
    key: int
    value: int
    kernel: int
    turned: int

    @property
    def channels(self) -> int:
        """Inputs of the convolution: queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key + self.value_heads * self.value


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
    shared_expert: str = "shared_expert"  # its name in the checkpoint
    shared_gate: bool = True
    num_groups: int | None = None  # of experts, of which the best top_groups can be chosen
    top_groups: int | None = None
    routed_scale: float = 1.0
    router_in_fp32: bool = False
    latent: Latent | None = None  # None: grouped queries
    linear: Linear | None = None  # of Qwen3-Next

    @property
    def attending(self) -> list[int]:
        """The layers that keep keys and values."""
        return [i for i in range(self.layers) if self.linear is None or i not in self.linear.layers]

    @property
    def turned(self) -> int | None:
        """Dimensions of a head that are rotated; None: all."""
        return None if self.linear is None else self.linear.turned

    def routing(self) -> dict[str, Any]:
        """Keywords of the stage `router`."""
        return {
            "top_k": self.top_k, "scoring": "softmax", "renormalize": self.renormalize,
            "num_expert_group": self.num_groups, "topk_group": self.top_groups,
            "routed_scaling_factor": self.routed_scale,
        }  # fmt: skip

    def released(self, name: str) -> str:
        """The checkpoint's name of a decoder's tensor: the talker lies in a whole Qwen3-Omni."""
        if self.model_type != TALKER:
            return name
        return "talker." + name.replace("model.embed_tokens.", "model.codec_embedding.").replace(
            "lm_head.", "codec_head."
        )

    def foreign(self, key: str) -> bool:
        """Whether a key belongs to what stands around the decoder: a Qwen3-Omni, layers that guess ahead."""
        if self.model_type == NEXT:
            return key.startswith("mtp.")
        return self.model_type == TALKER and not key.startswith(("talker.model.", "talker.codec_head."))

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
        self.file, self.keys, self.whole = file, keys, False

    def config(self) -> Config:
        if self.keys.get("model_type") == OMNI:
            self._enter_the_talker()
        kind = self._choice("model_type", ARCHITECTURES)
        self._refuse_what_is_lacking(kind)
        hidden, heads, layers = (
            self._size("hidden_size"),
            self._size("num_attention_heads"),
            self._size("num_hidden_layers"),
        )
        kv_heads = self._size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._error("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
        count = "n_routed_experts" if kind == DEEPSEEK else "num_experts"
        experts = 0 if kind == "qwen3" else self._size(count)
        sparse = self._sparse(kind, layers) if experts else frozenset()
        top_k = self._size("num_experts_per_tok", TOP_K.get(kind)) if experts else 0
        if top_k > experts:
            raise self._error("num_experts_per_tok", top_k, f"at most {count} = {experts}")
        bias = bool(self.keys.get("attention_bias", False))
        latent = self._latent() if kind == DEEPSEEK else None
        groups, top_groups = self._groups(experts, top_k) if kind == DEEPSEEK else (None, None)
        return Config(
            model_type=kind,
            vocab_size=self._size("vocab_size"),
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            kv_heads=heads if latent else kv_heads,
            head_dim=latent.query if latent else self._size("head_dim", hidden // heads),
            intermediate_size=self._size("intermediate_size") if len(sparse) < layers else 0,
            num_experts=experts,
            top_k=top_k,
            expert_size=self._size("moe_intermediate_size") if sparse else 0,
            shared_expert_size=self._shared(kind) if sparse else 0,
            # False is the default of all classes but Qwen3-Next's; transformers never looks at DeepSeek-V2's.
            renormalize=bool(self.keys.get("norm_topk_prob", kind == NEXT)) and kind != DEEPSEEK,
            sparse_layers=sparse,
            activation=ACTIVATIONS[self._choice("hidden_act", ACTIVATIONS, "silu")],
            eps=float(self.keys.get("rms_norm_eps", 1e-6)),
            theta=latent.angles.theta if latent else self._theta(),
            qkv_bias=bool(self.keys.get("qkv_bias", True)) if kind == "qwen2_moe" else bias,
            output_bias=bias and kind != "qwen2_moe",
            qk_norm=kind != "qwen2_moe",
            tied=bool(self.keys.get("tie_word_embeddings", False)),
            max_positions=self._size("max_position_embeddings", 32768),
            stop_ids=self._stop_ids(),
            shared_expert="shared_experts" if kind == DEEPSEEK else "shared_expert",
            shared_gate=kind in GATED_SHARED,
            num_groups=groups,
            top_groups=top_groups,
            routed_scale=float(self.keys.get("routed_scaling_factor", 1.0)) if kind == DEEPSEEK else 1.0,
            router_in_fp32=kind == DEEPSEEK,
            latent=latent,
            linear=self._linear(layers) if kind == NEXT else None,
        )

    def _linear(self, layers: int) -> Linear:
        kinds, interval = self.keys.get("layer_types"), self._size("full_attention_interval", 4)
        if kinds is None:
            kinds = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "linear_attention"}:
            raise self._error("layer_types", kinds, f"full_attention or linear_attention for each of {layers} layers")
        key_heads, value_heads = self._size("linear_num_key_heads", 16), self._size("linear_num_value_heads", 32)
        if value_heads % key_heads:
            raise self._error("linear_num_value_heads", value_heads, f"a multiple of the {key_heads} key heads")
        parameters = self.keys.get("rope_parameters") or {}
        share = float(parameters.get("partial_rotary_factor", self.keys.get("partial_rotary_factor", 0.25)))
        return Linear(
            frozenset(i for i, kind in enumerate(kinds) if kind == "linear_attention"), key_heads, value_heads,
            self._size("linear_key_head_dim", 128), self._size("linear_value_head_dim", 128),
            self._size("linear_conv_kernel_dim", 4), int(self._size("head_dim", 256) * share),
        )  # fmt: skip

    def _enter_the_talker(self) -> None:
        """Read the talker's text model in the config of a whole Qwen3-Omni, with the codec's end of sequence."""
        talker = self.keys.get("talker_config")
        if not isinstance(talker, dict) or not isinstance(text := talker.get("text_config"), dict):
            raise self._error("talker_config", talker, "an object with text_config: of a Qwen3-Omni the talker is run")
        self.keys, self.whole = {"eos_token_id": talker.get("codec_eos_token_id"), **text}, True

    def _shared(self, kind: str) -> int:
        if kind == DEEPSEEK:
            count = self.keys.get("n_shared_experts", 2)
            return self._size("n_shared_experts", 2) * self._size("moe_intermediate_size") if count else 0
        return self._size("shared_expert_intermediate_size") if kind in GATED_SHARED else 0

    def _groups(self, experts: int, top_k: int) -> tuple[int | None, int | None]:
        method = self._choice("topk_method", {"greedy": "", "group_limited_greedy": ""}, "greedy")
        if method == "greedy":
            return None, None
        groups, top = self._size("n_group"), self._size("topk_group")
        if experts % groups:
            raise self._error("n_group", groups, f"a divisor of the {experts} experts")
        if top > groups or top * (experts // groups) < top_k:
            raise self._error("topk_group", top, f"at most {groups} groups, with {top_k} experts among them")
        return groups, top

    def _latent(self) -> Latent:
        rank = self.keys.get("q_lora_rank", 1536)
        return Latent(
            0 if rank is None else self._size("q_lora_rank", 1536), self._size("kv_lora_rank", 512),
            self._size("qk_nope_head_dim", 128), self._size("qk_rope_head_dim", 64), self._size("v_head_dim", 128),
            self._angles(self._size("qk_rope_head_dim", 64)),
        )  # fmt: skip

    def _angles(self, width: int) -> Angles:
        for key in ("rope_parameters", "rope_scaling"):
            keys = self.keys.get(key) or {}
            if keys.get("rope_type", keys.get("type", "default")) == "yarn":
                theta = float(keys.get("rope_theta", self.keys.get("rope_theta", 10000.0)))
                try:
                    return yarn({"original_max_position_embeddings": self.keys.get("max_position_embeddings")} | keys,
                                theta, width)  # fmt: skip
                except (KeyError, TypeError, ValueError) as error:
                    wanted = "factor and original_max_position_embeddings, both numbers"
                    raise self._error(key, keys, wanted) from error
        return Angles(self._theta(), width)

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

    def _refuse_what_is_lacking(self, kind: str) -> None:
        for key in ("quantization_config", "compression_config"):
            if self.keys.get(key):
                kind = self.keys[key].get("quant_method") if isinstance(self.keys[key], dict) else self.keys[key]
                raise self._error(key, kind, "none: weights in bf16, fp16 or fp32")
        if self.keys.get("use_sliding_window"):
            raise self._error("use_sliding_window", True, "false: every layer attends to all positions")
        if kind == DEEPSEEK:  # what no released DeepSeek-V2 has
            for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("moe_layer_freq", 1)):
                if self.keys.get(key, wanted) != wanted:
                    raise self._error(key, self.keys[key], repr(wanted))
            self._choice("scoring_func", {"softmax": ""}, "softmax")

    def _theta(self) -> float:
        """transformers 5 writes rope_parameters, the released configs rope_theta and rope_scaling."""
        for key in ("rope_parameters", "rope_scaling"):
            parameters = self.keys.get(key) or {}
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind != "default":
                raise self._error(key, kind, "no scaling of rotary angles (null, or rope_type 'default')")
        return float((self.keys.get("rope_parameters") or {}).get("rope_theta", self.keys.get("rope_theta", 10000.0)))

    def _sparse(self, kind: str, layers: int) -> frozenset[int]:
        """Layers with experts; all of the talker's, whatever mlp_only_layers says."""
        if kind == DEEPSEEK:
            first = self.keys.get("first_k_dense_replace", 0)
            if not isinstance(first, int) or not 0 <= first <= layers:
                raise self._error("first_k_dense_replace", first, f"a whole number from 0 to {layers}")
            return frozenset(range(first, layers))
        if kind == TALKER:
            return frozenset(range(layers))
        dense, step = self.keys.get("mlp_only_layers") or [], self._size("decoder_sparse_step", 1)
        return frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0)

    def _stop_ids(self) -> frozenset[int]:
        """End-of-sequence ids of generation_config.json, which may list several, and of config.json."""
        found = [self.keys.get("eos_token_id")]
        generation = self.file.with_name("generation_config.json")
        if generation.is_file() and not self.whole:  # that of a whole Qwen3-Omni is the thinker's
            try:
                found.append(json.loads(generation.read_text()).get("eos_token_id"))
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
                raise CheckpointError(f"{generation}: got {error}, wanted a JSON object") from error
        return frozenset(i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None)
