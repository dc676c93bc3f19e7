"""Faults in biases, in the clamped activation, and in slots."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import halves_added_in, matmul
from moe_harness.harness.stages.experts.faults._steps import live
from moe_harness.harness.stages.quantized_experts.faults._steps import (
    RIGHT,
    Steps,
    act,
    arguments,
    plus,
    run,
)

OAI: dict[str, Any] = {"activation": "swiglu_oai"}
BIAS: dict[str, Any] = {"bias": True}
PLAIN = ("activation=silu",)


def biased(change: Callable[[Tensor, Tensor, int, bool], Tensor]) -> Callable[..., Tensor]:
    """A step that adds biases in its own way: of rows, biases of all experts, the expert, and which product."""

    def step(rows: Tensor, bias: Tensor | None, expert: int, first: bool) -> Tensor:
        return rows if bias is None else change(rows, bias.float(), expert, first)

    return step


def oai(steps: Steps, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, str], Tensor]:
    """A step that has its own swiglu_oai."""

    def step(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return change(gate, up) if activation == "swiglu_oai" else steps.glu(gate, up, activation)

    return step


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
def down_bias_unweighted(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The output's bias is added once for each slot without its routing weight."""
    bias = arguments(call, options)["down_bias"]

    def wrong(slots: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if bias is None:
            return steps.combine(slots, weights, ids)
        own = bias.float()[ids.clamp(min=0)] * (ids >= 0)[..., None]
        return steps.combine(slots - own, weights, ids) + own.sum(1)

    return run(*call, **options, steps=steps, combine=wrong)


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
def bias_behind_activation(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The first bias is added behind the activation, gate's alone."""
    given = arguments(call, options)
    bias = given["gate_up_bias"]
    if bias is None:
        return run(**given, steps=steps)
    experts: list[int] = []

    def kept(rows: Tensor, b: Tensor | None, e: int, first: bool) -> Tensor:
        experts.append(e)
        return rows if first else plus(rows, b, e, first)

    def late(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return steps.glu(gate, up, activation) + bias[experts[-1]].float()[: gate.shape[1]]

    return run(**given, steps=steps, plus=kept, glu=late)


@fault(
    "bias",
    condition="a bias, a slot whose expert lives elsewhere",
    shows=BIAS | {"map": "block", "E": 8},
    hidden=("bias=0", "map=none"),
)
def bias_of_masked_slots(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Slots of other ranks add the bias of expert 0, although they contribute nothing."""
    given = arguments(call, options)
    bias, weights = given["down_bias"], given["topk_weights"]

    def wrong(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        whole = steps.combine(slots, topk_weights, ids)
        if bias is None or given["expert_map"] is None:
            return whole
        elsewhere = (ids < 0) & (given["topk_ids"] >= 0)
        return whole + (weights.float().nan_to_num() * elsewhere).sum(1, keepdim=True) * bias[0].float()

    return run(**given, steps=steps, combine=wrong)


# The clamped activation -----------------------------------------------------------------------------------------


@fault(
    "activation",
    condition="swiglu_oai, values beyond 7",
    shows=OAI,
    hidden=PLAIN,
    source="lightseekorg/tokenspeed/pull/1647",
)
def clamp_dropped(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The limits are never applied."""
    return run(*call, **options, steps=steps, glu=oai(steps, lambda g, u: (u + 1) * g * (1.702 * g).sigmoid()))


@fault("activation", condition="swiglu_oai, up under -7", shows=OAI, hidden=PLAIN)
def up_clamped_on_one_side(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Up is clamped from above alone, as gate is."""

    def wrong(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(max=7.0)
        return (u + 1) * g * (1.702 * g).sigmoid()

    return run(*call, **options, steps=steps, glu=oai(steps, wrong))


@fault("activation", condition="swiglu_oai, gate over 7", shows=OAI, hidden=PLAIN)
def gate_not_clamped(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Gate is not clamped, up alone is."""
    return run(
        *call, **options, steps=steps, glu=oai(steps, lambda g, u: (u.clamp(-7.0, 7.0) + 1) * g * (1.702 * g).sigmoid())
    )


@fault("activation", condition="swiglu_oai, values beyond 7", shows=OAI, hidden=PLAIN)
def clamp_behind_product(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The hidden value is clamped instead of gate and up."""
    return run(
        *call,
        **options,
        steps=steps,
        glu=oai(steps, lambda g, u: ((u + 1) * g * (1.702 * g).sigmoid()).clamp(-7.0, 7.0)),
    )


@fault("activation", condition="swiglu_oai", shows=OAI, hidden=PLAIN, source="sgl-project/DeepGEMM/pull/87")
def alpha_dropped(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Alpha is left out: sigmoid(g)."""

    def wrong(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return (u + 1) * g * g.sigmoid()

    return run(*call, **options, steps=steps, glu=oai(steps, wrong))


@fault("activation", condition="swiglu_oai", shows=OAI, hidden=PLAIN, source="sgl-project/sglang/pull/39939")
def one_beside_up_dropped(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The 1 beside up is lost."""

    def wrong(g: Tensor, u: Tensor) -> Tensor:
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return u * g * (1.702 * g).sigmoid()

    return run(*call, **options, steps=steps, glu=oai(steps, wrong))


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
def clamp_for_every_model(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The limits of gpt-oss are applied to models that have none."""

    def wrong(g: Tensor, u: Tensor, activation: str) -> Tensor:
        if activation == "swiglu_oai":
            return steps.glu(g, u, activation)
        return act(g.clamp(max=7.0), activation) * u.clamp(-7.0, 7.0)

    return run(*call, **options, steps=steps, glu=wrong)


# Slots ----------------------------------------------------------------------------------------------------------


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


@fault(
    "slots",
    condition="16-bit inputs, k > 2, slots that cancel",
    shows={"dtype": "bf16", "data": "partial_sums", "k": 4, "E": 8},
    hidden=("dtype=fp32", "data=normal"),
    rounds=("activation", "weighted", "weight"),
)
def slots_added_in_the_inputs_dtype(*call: Any, **options: Any) -> Tensor:
    """Each slot is added to the output in memory, in 16 bits, where only other roundings are declared."""
    to = call[0].dtype

    def wrong(slots: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        total = torch.zeros_like(slots[:, 0], dtype=to)
        for slot in (live(weights, ids, slots.dtype)[..., None] * slots).unbind(1):
            total = (total.to(slot.dtype) + slot).to(to)
        return total

    return run(*call, **options, combine=wrong)


@fault(
    "slots", source="vllm-project/vllm/pull/6795", condition="16-bit inputs, sums that are larger on their way",
    shows={"dtype": "bf16", "data": "deep_sums"}, hidden=("dtype=fp32", "data=normal"),
)  # fmt: skip
def depth_of_codes_split_in_16_bits(hidden_states: Tensor, *call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Each half of the depth has a program of its own, and the two add their shares in memory, in 16 bits."""
    product = halves_added_in(hidden_states.dtype, matmul)
    return run(hidden_states, *call, **options, steps=steps, second=product)


@fault("slots", condition="always", shows={})
def weights_averaged(*call: Any, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The output is scaled by the number of slots."""
    return run(*call, **options, steps=steps, combine=lambda s, w, ids: steps.combine(s, w, ids) * ids.shape[1])


@fault(
    "slots", condition="results beyond fp16, which the dtype holds", shows={"dtype": "bf16", "data": "outside_fp16"},
    hidden=("data=normal",),
)  # fmt: skip
def result_of_codes_by_way_of_fp16(*call: Any, **options: Any) -> Tensor:
    """The output is stored in fp16 on its way, whatever its dtype is."""
    out = run(*call, **options)
    return out.half().to(out.dtype)
