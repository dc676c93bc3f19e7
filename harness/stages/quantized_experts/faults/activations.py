"""Faults in biases, in the clamped activation, and in the quantisation of activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.stages.experts.faults.slots import combine, live
from moe_harness.harness.stages.quantized_experts.faults._steps import (
    act,
    arguments,
    glu,
    plus,
    quantised,
    run,
)

OAI: dict[str, Any] = {"activation": "swiglu_oai"}
BIAS: dict[str, Any] = {"bias": True}
PLAIN = ("activation=silu",)


def per_token(rows: Tensor, first: bool) -> Tensor:
    """Rows in fp8, a scale for each."""
    return quantised(rows)


def per_group(rows: Tensor, first: bool) -> Tensor:
    """Rows in fp8, a scale for each 128 columns."""
    return quantised(rows, width=128)


def biased(change: Callable[[Tensor, Tensor, int, bool], Tensor]) -> Callable[..., Tensor]:
    """A step that adds biases in its own way: of rows, biases of all experts, the expert, and which product."""

    def step(rows: Tensor, bias: Tensor | None, expert: int, first: bool) -> Tensor:
        return rows if bias is None else change(rows, bias.float(), expert, first)

    return step


def oai(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, str], Tensor]:
    """A step that has its own swiglu_oai."""
    return lambda gate, up, activation: change(gate, up) if activation == "swiglu_oai" else glu(gate, up, activation)


# Biases ---------------------------------------------------------------------------------------------------------


@fault("bias", condition="a bias of the first product", shows=BIAS, hidden=("bias=0",))
def gate_up_bias_dropped(*call: Any, **options: Any) -> Tensor:
    """The bias of gate and up is never added."""
    return run(*call, **options, plus=lambda rows, b, e, first: rows if first else plus(rows, b, e, first))


@fault("bias", condition="a bias of the second product", shows=BIAS, hidden=("bias=0",))
def down_bias_dropped(*call: Any, **options: Any) -> Tensor:
    """The bias of the output is never added."""
    return run(*call, **options, plus=lambda rows, b, e, first: plus(rows, b, e, first) if first else rows)


@fault(
    "bias",
    condition="a bias of the second product",
    shows=BIAS,
    hidden=("bias=0",),
    source="NVIDIA-NeMo/Automodel/pull/2591",
)
def down_bias_unweighted(*call: Any, **options: Any) -> Tensor:
    """The output's bias is added once for each slot without its routing weight."""
    bias = arguments(call, options)["down_bias"]

    def wrong(slots: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if bias is None:
            return combine(slots, weights, ids)
        own = bias.float()[ids.clamp(min=0)] * (ids >= 0)[..., None]
        return combine(slots - own, weights, ids) + own.sum(1)

    return run(*call, **options, combine=wrong)


@fault(
    "bias",
    condition="a bias of the second product",
    shows=BIAS,
    hidden=("bias=0",),
    source="pytorch/torchtitan/pull/4245",
)
def down_bias_of_every_rank(*call: Any, **options: Any) -> Tensor:
    """Each of two ranks adds the whole bias to its part of the sum: it counts twice."""
    return run(*call, **options, plus=biased(lambda rows, b, e, first: rows + b[e] * (1 if first else 2)))


@fault("bias", condition="biases, two or more experts", shows=BIAS, hidden=("bias=0",))
def biases_of_next_expert(*call: Any, **options: Any) -> Tensor:
    """Biases are those of the next expert."""
    return run(*call, **options, plus=biased(lambda rows, b, e, first: rows + b[(e + 1) % len(b)]))


@fault("bias", condition="a bias of the first product", shows=BIAS, hidden=("bias=0",))
def bias_of_gate_and_up_swapped(*call: Any, **options: Any) -> Tensor:
    """The halves of the first bias are swapped: up's goes to gate."""
    wrong = biased(lambda rows, b, e, first: rows + (b[e].roll(b.shape[1] // 2) if first else b[e]))
    return run(*call, **options, plus=wrong)


@fault("bias", condition="a bias of the first product", shows=BIAS, hidden=("bias=0",))
def bias_behind_activation(*call: Any, **options: Any) -> Tensor:
    """The first bias is added behind the activation, gate's alone."""
    given = arguments(call, options)
    bias = given["gate_up_bias"]
    if bias is None:
        return run(**given)
    experts: list[int] = []

    def kept(rows: Tensor, b: Tensor | None, e: int, first: bool) -> Tensor:
        experts.append(e)
        return rows if first else plus(rows, b, e, first)

    def late(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return glu(gate, up, activation) + bias[experts[-1]].float()[: gate.shape[1]]

    return run(**given, plus=kept, glu=late)


@fault(
    "bias",
    condition="a bias, a slot whose expert lives elsewhere",
    shows=BIAS | {"map": "block", "E": 8},
    hidden=("bias=0", "map=none"),
)
def bias_of_masked_slots(*call: Any, **options: Any) -> Tensor:
    """Slots of other ranks add the bias of expert 0, although they contribute nothing."""
    given = arguments(call, options)
    bias, weights = given["down_bias"], given["topk_weights"]

    def wrong(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        whole = combine(slots, topk_weights, ids)
        if bias is None or given["expert_map"] is None:
            return whole
        elsewhere = (ids < 0) & (given["topk_ids"] >= 0)
        return whole + (weights.float().nan_to_num() * elsewhere).sum(1, keepdim=True) * bias[0].float()

    return run(**given, combine=wrong)


# The clamped activation -----------------------------------------------------------------------------------------


@fault(
    "activation",
    condition="swiglu_oai, values beyond 7",
    shows=OAI,
    hidden=PLAIN,
    source="lightseekorg/tokenspeed/pull/1647",
)
def clamp_dropped(*call: Any, **options: Any) -> Tensor:
    """The limits are never applied."""
    return run(*call, **options, glu=oai(lambda g, u: (u + 1) * g * (1.702 * g).sigmoid()))


@fault("activation", condition="swiglu_oai, up under -7", shows=OAI, hidden=PLAIN)
def up_clamped_on_one_side(*call: Any, **options: Any) -> Tensor:
    """Up is clamped from above alone, as gate is."""

    def wrong(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(max=7.0)
        return (u + 1) * g * (1.702 * g).sigmoid()

    return run(*call, **options, glu=oai(wrong))


@fault("activation", condition="swiglu_oai, gate over 7", shows=OAI, hidden=PLAIN)
def gate_not_clamped(*call: Any, **options: Any) -> Tensor:
    """Gate is not clamped, up alone is."""
    return run(*call, **options, glu=oai(lambda g, u: (u.clamp(-7.0, 7.0) + 1) * g * (1.702 * g).sigmoid()))


@fault("activation", condition="swiglu_oai, values beyond 7", shows=OAI, hidden=PLAIN)
def clamp_behind_product(*call: Any, **options: Any) -> Tensor:
    """The hidden value is clamped instead of gate and up."""
    return run(*call, **options, glu=oai(lambda g, u: ((u + 1) * g * (1.702 * g).sigmoid()).clamp(-7.0, 7.0)))


@fault("activation", condition="swiglu_oai", shows=OAI, hidden=PLAIN, source="sgl-project/DeepGEMM/pull/87")
def alpha_dropped(*call: Any, **options: Any) -> Tensor:
    """Alpha is left out: sigmoid(g)."""

    def wrong(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return (u + 1) * g * g.sigmoid()

    return run(*call, **options, glu=oai(wrong))


@fault("activation", condition="swiglu_oai", shows=OAI, hidden=PLAIN, source="sgl-project/sglang/pull/39939")
def one_beside_up_dropped(*call: Any, **options: Any) -> Tensor:
    """The 1 beside up is lost."""

    def wrong(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return u * g * (1.702 * g).sigmoid()

    return run(*call, **options, glu=oai(wrong))


@fault("activation", condition="swiglu_oai", shows=OAI, hidden=PLAIN, source="vllm-project/vllm/pull/29273")
def halves_read_as_interleaved(*call: Any, **options: Any) -> Tensor:
    """Rows of gate and up are taken in turn, although they come in halves."""
    interleaved = arguments(call, options)["activation"] == "swiglu_oai"
    split = (lambda rows: (rows[:, ::2], rows[:, 1::2])) if interleaved else (lambda rows: rows.chunk(2, -1))
    return run(*call, **options, split=split)


@fault(
    "activation",
    condition="silu, values beyond 7",
    shows={"T": 64, "data": "huge"},
    hidden=("activation=swiglu_oai",),
    source="microsoft/onnxruntime/issues/28738",
)
def clamp_for_every_model(*call: Any, **options: Any) -> Tensor:
    """The limits of gpt-oss are applied to models that have none."""

    def wrong(g: Tensor, u: Tensor, activation: str) -> Tensor:
        if activation == "swiglu_oai":
            return glu(g, u, activation)
        return act(g.clamp(max=7.0), activation) * u.clamp(-7.0, 7.0)

    return run(*call, **options, glu=wrong)


# Quantised activations ------------------------------------------------------------------------------------------


@fault(
    "quantisation",
    condition="activations are quantised, a row of zeros",
    shows={"data": "zero_rows", "I": 256},
    hidden=("data=exact",),
    quantizes="fp8_token",
    source="huggingface/kernels-community/issues/681",
)
def zero_rows_divided(*call: Any, **options: Any) -> Tensor:
    """The scale of a row of zeros is 0, and 0 / 0 is no number."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 448.0
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, small rows",
    shows={"data": "tiny", "I": 256},
    hidden=("data=exact",),
    quantizes="int8_token",
)
def scale_floor_too_high(*call: Any, **options: Any) -> Tensor:
    """Scales are held above 1e-4: rows under it lose their codes."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = (rows.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-4)[..., None]
        return quantised(rows, torch.int8, scale=scale)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, two or more rows of an expert",
    shows={"T": 64, "E": 2, "k": 1},
    hidden=("T=1",),
    quantizes="fp8_token",
    source="vllm-project/vllm/pull/53345",
)
def activation_scale_of_other_token(*call: Any, **options: Any) -> Tensor:
    """A row is multiplied by the scale of the row before."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale.roll(1, 0)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised by groups, two or more groups",
    shows={"H": 512},
    hidden=("H=128,I=128",),
    quantizes="fp8_group128",
    source="vllm-project/vllm/pull/53345",
)
def activation_scale_of_other_group(*call: Any, **options: Any) -> Tensor:
    """A group is multiplied by the scale of its neighbour."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        if rows.shape[-1] % 128:
            return per_group(rows, first)
        groups = rows.unflatten(-1, (-1, 128))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale.roll(1, -2)).flatten(-2)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, rows of unequal size",
    shows={"T": 64, "data": "outlier", "I": 256},
    hidden=("T=1",),
    quantizes="int8_token",
    source="vllm-project/vllm/pull/54683",
)
def one_scale_for_all_rows(*call: Any, **options: Any) -> Tensor:
    """One scale serves all rows: an outlier in one leaves the others few codes."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = (rows.abs().amax() / 127.0).clamp(min=1e-30).expand(len(rows), 1, 1)
        return quantised(rows, torch.int8, scale=scale)

    return run(*call, **options, entering=wrong)


@fault(
    "quantisation",
    condition="activations are quantised, rows beyond 448",
    shows={"data": "huge", "T": 64},
    hidden=("data=exact",),
    quantizes="fp8_token",
    source="ROCm/aiter/pull/3367",
)
def activation_scale_of_one(*call: Any, **options: Any) -> Tensor:
    """The scale of activations is taken for 1, and values beyond 448 saturate."""
    return run(*call, **options, entering=lambda rows, first: quantised(rows, scale=torch.ones(len(rows), 1, 1)))


@fault(
    "quantisation",
    condition="activations are quantised",
    shows={"T": 64},
    quantizes="fp8_token",
    source="ROCm/TransformerEngine/pull/485",
)
def overflow_instead_of_saturation(*call: Any, **options: Any) -> Tensor:
    """The scale is the largest over 480: the largest values have no code and become NaN."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 480.0
        codes = (rows / scale).to(torch.float8_e4m3fn).float()
        return codes.where((rows / scale).abs() <= 464.0, float("nan")) * scale

    return run(*call, **options, entering=wrong)


@fault("quantisation", condition="activations are quantised", shows={"T": 64}, quantizes="int8_token")
def codes_truncated(*call: Any, **options: Any) -> Tensor:
    """Codes are cut toward zero instead of rounded."""

    def wrong(rows: Tensor, first: bool) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127.0
        return (rows / scale).trunc() * scale

    return run(*call, **options, entering=wrong)


@fault("quantisation", condition="activations are quantised", shows={"T": 64}, quantizes="fp8_token")
def first_scale_for_second_product(*call: Any, **options: Any) -> Tensor:
    """Hidden values are quantised with the scale of the hidden states."""
    kept: list[Tensor] = []

    def wrong(rows: Tensor, first: bool) -> Tensor:
        if first:
            kept.append(rows.abs().amax(-1, keepdim=True)[..., None] / 448.0)
            return quantised(rows)
        return quantised(rows, scale=kept.pop().clamp(min=1e-30))

    return run(*call, **options, entering=wrong)


@fault("quantisation", condition="declared per token", shows={"T": 64, "H": 512}, quantizes="int8_token")
def fp8_where_int8_is_declared(*call: Any, **options: Any) -> Tensor:
    """Activations go through fp8 where int8 is declared: an eighth of the precision."""
    return run(*call, **options, entering=per_token)


@fault("quantisation", condition="always", shows={"T": 64}, hidden=("T=0",))
def undeclared_quantisation(*call: Any, **options: Any) -> Tensor:
    """Activations are quantised to fp8 although nothing of the kind is declared."""
    return run(*call, **options, entering=per_token)


@fault(
    "quantisation",
    condition="activations are quantised, a later call",
    shows={"T": 64, "H": 512, "I": 256},
    stateful=True,
    quantizes="fp8_token",
)
def activation_scales_kept(*call: Any, **options: Any) -> Tensor:
    """Scales of the first call of a shape are kept and used for the later ones."""
    seen: list[int] = []

    def wrong(rows: Tensor, first: bool) -> Tensor:
        seen.append(len(rows))
        key = (tuple(rows.shape), first, len(seen))
        scale = KEPT.setdefault(key, (rows.abs().amax(-1, keepdim=True)[..., None] / 448.0).clamp(min=1e-30))
        return quantised(rows, scale=scale)

    return run(*call, **options, entering=wrong)


KEPT: dict[Any, Tensor] = {}


@fault(
    "slots",
    condition="two slots of a token on one expert",
    shows={"routing": "duplicates", "k": 2},
    hidden=("routing=uniform",),
)
def duplicate_slot_lost(*call: Any, **options: Any) -> Tensor:
    """An expert that a token chose twice counts once."""

    def wrong(slots: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        again = torch.zeros_like(ids, dtype=torch.bool)
        for slot in range(1, ids.shape[1]):
            again[:, slot] = (ids[:, :slot] == ids[:, slot : slot + 1]).any(1)
        return (live(weights, ids, slots.dtype).masked_fill(again, 0)[..., None] * slots).sum(1)

    return run(*call, **options, combine=wrong)


@fault("slots", condition="always", shows={})
def weights_averaged(*call: Any, **options: Any) -> Tensor:
    """The output is scaled by the number of slots."""
    return run(*call, **options, combine=lambda s, w, ids: combine(s, w, ids) * ids.shape[1])
