"""The reference block against transformers' own: every family's real module, with random weights.

In fp64 transformers leaves fp64 in one place only, the scores (and the logits of DeepSeek), which it computes in fp32;
there the comparison is sharp.  In the dtype itself it shows that nothing else differs either, within what rounding can
do.  Tokens whose choice of experts rounding could change are left out, and most tokens must remain.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.contracts import load
from moe_harness.reference import moe_block as reference
from moe_harness.suites.moe_block.worst_case import worst_case

pytest.importorskip("transformers")

H, I, D, E, K = 64, 32, 48, 16, 4  # noqa: E741 - D is the shared expert's intermediate size
SHARED = {
    "qwen2_moe": "shared_expert",
    "qwen3_next": "shared_expert",
    "qwen3_5_moe_text": "shared_expert",
    "qwen3_omni_moe_talker_text": "shared_expert",
    "deepseek_v2": "shared_experts",
    "deepseek_v3": "shared_experts",
}
GROUPS = {"n_group": 4, "topk_group": 2}
CONFIGS = {name: {"model_type": name, "num_experts_per_tok": K} for name in reference.FAMILIES}
CONFIGS["deepseek_v3"] |= GROUPS
CONFIGS["deepseek_v2"] |= {"routed_scaling_factor": 16.0}
CONFIGS["deepseek_v2_groups"] = CONFIGS["deepseek_v2"] | GROUPS | {"topk_method": "group_limited_greedy"}


@dataclass
class Block:
    """One block's operands in fp64; the values are those of the dtype it was drawn for."""

    hidden_states: Tensor
    weights: dict[str, Tensor]
    config: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], dict]:
        return self.hidden_states.to(dtype), {name: self.as_held(name, dtype) for name in self.weights}, self.config

    def as_held(self, name: str, dtype: torch.dtype) -> Tensor:
        """The correction bias stays in fp32 at least, as in the checkpoints."""
        keep = "bias" in name and dtype != torch.float64
        return self.weights[name].to(torch.float32 if keep else dtype)


def draw(name: str, tokens: int, dtype: torch.dtype, norm_topk_prob: bool | None = None) -> Block:
    """Random operands with |gate| around 1 to 4 and logits of that size, so that routing has a clear order."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + tokens)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).double()

    config = dict(CONFIGS[name])
    if norm_topk_prob is not None:
        config["norm_topk_prob"] = norm_topk_prob
    family = config["model_type"]
    weights = {
        "gate.weight": normal(E, H, scale=2 / H**0.5),
        "experts.gate_up_proj": normal(E, 2 * I, H, scale=2 / H**0.5),
        "experts.down_proj": normal(E, H, I, scale=1 / I**0.5),
    }
    if family == "deepseek_v3":
        weights["gate.e_score_correction_bias"] = normal(E, scale=0.2)
    if family in SHARED:
        weights |= {
            f"{SHARED[family]}.gate_proj.weight": normal(D, H, scale=2 / H**0.5),
            f"{SHARED[family]}.up_proj.weight": normal(D, H, scale=2 / H**0.5),
            f"{SHARED[family]}.down_proj.weight": normal(H, D, scale=1 / D**0.5),
        }
    if SHARED.get(family) == "shared_expert":
        weights["shared_expert_gate.weight"] = normal(1, H, scale=1 / H**0.5)
    return Block(normal(tokens, H, scale=1.0), weights, config)


def real_block(block: Block, dtype: torch.dtype) -> Tensor:
    """What transformers' module gives in `dtype`."""
    return load("moe_block", "transformers:block").function(*block.to(dtype))


def excess(block: Block, output: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """|output - expected| over the bound, [certain tokens, H], and which tokens are certain."""
    limit = worst_case(block.hidden_states, block.weights, block.config, dtype)
    ratio = (output.double() - expected).abs() / limit.bound
    return ratio[limit.certain], limit.certain


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("norm_topk_prob", [None, True, False])
@pytest.mark.parametrize("arithmetic", ["fp64", "native"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_equals_the_real_block(name, dtype, arithmetic, norm_topk_prob, tokens):
    block = draw(name, tokens, DTYPES[dtype], norm_topk_prob)
    compute = torch.float64 if arithmetic == "fp64" else DTYPES[dtype]
    expected = reference.moe_block(block.hidden_states, block.weights, block.config)
    ratio, certain = excess(block, real_block(block, compute), expected, compute)
    assert tokens == 1 or certain.double().mean() >= 0.5, f"only {int(certain.sum())} of {tokens} tokens can be judged"
    assert (ratio <= 1).all(), f"{name}: error is {ratio.max():.3g} times the bound"


def swapped_halves(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    halves = weights["experts.gate_up_proj"].chunk(2, dim=1)
    return reference.moe_block(x, weights | {"experts.gate_up_proj": torch.cat(halves[::-1], dim=1)}, config)


def gelu_for_silu(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    return reference.moe_block(x, weights, config | {"hidden_act": "gelu_pytorch_tanh"})


def one_slot_less(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    return reference.moe_block(x, weights, config | {"num_experts_per_tok": K - 1})


def last_column_lost(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    down = weights["experts.down_proj"].clone()
    down[..., -1] = 0
    return reference.moe_block(x, weights | {"experts.down_proj": down}, config)


def renormalisation_flipped(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    flipped = not reference.routing_rule(config).renormalize
    return reference.moe_block(x, weights, config | {"norm_topk_prob": flipped})


def scale_missing(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    return reference.moe_block(x, weights, config | {"routed_scaling_factor": 1.0})


def groups_ignored(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    return reference.moe_block(x, weights, config | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"})


def shared_expert_missing(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    routed = {name: weight for name, weight in weights.items() if not name.startswith("shared_")}
    return reference.moe_block(x, routed, config)


def shared_gate_missing(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    ungated = reference.gated_mlp(x, weights, "shared_expert", reference.activation(config))
    return shared_expert_missing(x, weights, config) + ungated


def bias_not_in_selection(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    bias = torch.zeros_like(weights["gate.e_score_correction_bias"])
    return reference.moe_block(x, weights | {"gate.e_score_correction_bias": bias}, config)


def bias_in_weights(x: Tensor, weights: dict[str, Tensor], config: dict) -> Tensor:
    logits = reference.router_logits(x, weights, config)
    _, ids = reference.routing(logits, weights, config)
    biased = (logits.sigmoid() + weights["gate.e_score_correction_bias"]).gather(1, ids)
    topk_weights = biased / biased.sum(1, keepdim=True) * reference.routing_rule(config).routed_scaling_factor
    routed = reference.experts(x, weights["experts.gate_up_proj"], weights["experts.down_proj"], topk_weights, ids)
    return routed + reference.shared_expert(x, weights, config)


GATED = [name for name, prefix in SHARED.items() if prefix == "shared_expert"]
FLAGGED = [name for name, family in reference.FAMILIES.items() if family.renormalize == "config"]
PLANTED: dict[Callable, list[str]] = {
    swapped_halves: list(CONFIGS),
    gelu_for_silu: list(CONFIGS),
    one_slot_less: list(CONFIGS),
    last_column_lost: list(CONFIGS),
    renormalisation_flipped: FLAGGED,
    scale_missing: ["deepseek_v2", "deepseek_v2_groups", "deepseek_v3"],
    groups_ignored: ["deepseek_v2_groups", "deepseek_v3"],
    shared_expert_missing: list(SHARED),
    shared_gate_missing: GATED,
    bias_not_in_selection: ["deepseek_v3"],
    bias_in_weights: ["deepseek_v3"],
}


@pytest.mark.parametrize(("change", "name"), [(change, name) for change, names in PLANTED.items() for name in names])
def test_a_planted_change_is_seen(change, name):
    block = draw(name, 33, torch.float32)
    wrong = change(block.hidden_states, block.weights, block.config)
    ratio, _ = excess(block, real_block(block, torch.float64), wrong, torch.float64)
    assert ratio.max() > 100, f"{change.__name__} on {name} shows only {ratio.max():.3g} times the bound"


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'gpt_oss', but should be one of qwen2_moe, .*deepseek_v3"):
        reference.family({"model_type": "gpt_oss"})


@pytest.mark.parametrize("name", reference.FAMILIES)
def test_absent_keys_take_the_defaults_of_the_class(name):
    """The rule from a config that says next to nothing equals the rule with transformers' own class defaults."""
    from transformers import CONFIG_MAPPING
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig

    talker = name == "qwen3_omni_moe_talker_text"
    defaults = (Qwen3OmniMoeTalkerTextConfig if talker else CONFIG_MAPPING[name])().to_dict()
    said = {"model_type": name} | ({"num_experts_per_tok": 6} if defaults["num_experts_per_tok"] is None else {})
    assert reference.routing_rule(said) == reference.routing_rule(defaults | said)


def test_left_over_and_missing_weights_are_named():
    block = draw("qwen3_moe", 2, torch.float32)
    block.weights["gate.bias"] = block.weights.pop("gate.weight")
    with pytest.raises(ValueError, match=r"missing \['gate.weight'\], left over \['gate.bias'\]"):
        reference.moe_block(block.hidden_states, block.weights, block.config)
