"""Faults of the experts stage in layout, activation, weighting and slots."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import wide
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, halves, live, locate, run, select

# Activation and layout ------------------------------------------------------------------------------------------


@fault("layout", source="sgl-project/sglang/pull/32430")
def gate_up_swapped(*call: Tensor, **options: Any) -> Tensor:
    """The halves of the fused projection are read as [up; gate]: GSM8K falls to 0."""
    return run(*call, **options, split=lambda rows: halves(rows)[::-1])


@fault("layout", source="vllm-project/vllm/pull/29273", condition="I > 1", hidden=("I=1",))
def gate_up_interleaved(*call: Tensor, **options: Any) -> Tensor:
    """Gate and up are read as interleaved columns: the model writes garbage."""
    return run(*call, **options, split=lambda rows: (rows[:, ::2], rows[:, 1::2]))


@fault("layout", source="FlashML-org/FreeToken/pull/104", condition="I even", shows={"I": 24}, hidden=("I=25",))
def fused_gate_up_chunked_across_shards(*call: Tensor, **options: Any) -> Tensor:
    """Each of two shards takes a half of the fused tensor: one holds all of gate, one all of up."""

    def split(rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.shape[1] % 4:
            return halves(rows)
        first, second, third, last = rows.chunk(4, -1)
        return torch.cat((first, third), -1), torch.cat((second, last), -1)

    return run(*call, **options, split=split)


@fault("sharding", source="sgl-project/sglang/pull/32963", condition="I > 1", hidden=("I=1",))
def one_shard_of_i_not_reduced(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The partial sum of one of two shards of I is never added: accuracy near 0."""

    def second(rows: Tensor, weight: Tensor) -> Tensor:
        kept = -(-rows.shape[1] // 2)
        return steps.matmul(rows[:, :kept], weight[:, :kept])

    return run(*call, **options, steps=steps, second=second)


@fault(
    "layout", source="unslothai/unsloth-zoo/issues/849", condition="I == H", shows={"H": 24, "I": 24}, hidden=("I=32",)
)
def down_transposed_if_square(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The layout of down_proj is guessed from its shape: square experts are used transposed."""

    def second(rows: Tensor, weight: Tensor) -> Tensor:
        return steps.matmul(rows, weight.T if weight.shape[0] == weight.shape[1] else weight)

    return run(*call, **options, steps=steps, second=second)


@fault(
    "layout", source="huggingface/transformers/issues/47031", condition="2I == H", shows={"H": 32, "I": 16},
    hidden=("I=24",),
)  # fmt: skip
def gate_up_transposed_if_square(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """A square gate_up_proj is taken for the legacy layout and used transposed."""

    def first(rows: Tensor, weight: Tensor) -> Tensor:
        return steps.matmul(rows, weight.T if weight.shape[0] == weight.shape[1] else weight)

    return run(*call, **options, steps=steps, first=first)


@fault(
    "layout", source="sgl-project/sglang/pull/28244", condition="I not a multiple of 64", shows={"I": 96},
    hidden=("I=64",),
)  # fmt: skip
def fallback_reads_shuffled_weights(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The fallback for an unsupported I reads weights that were shuffled for the other kernel."""

    def first(rows: Tensor, weight: Tensor) -> Tensor:
        if weight.shape[0] // 2 % 64 == 0:
            return steps.matmul(rows, weight)
        pairs = weight[: weight.shape[0] // 2 * 2].unflatten(0, (-1, 2))
        return steps.matmul(rows, pairs.flip(1).flatten(0, 1))

    return run(*call, **options, steps=steps, first=first)


@fault(
    "activation", source="sgl-project/sglang/pull/3170", condition="activation='gelu_tanh'",
    shows={"activation": "gelu_tanh"}, hidden=("activation=silu",),
)  # fmt: skip
def activation_ignored(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The activation is an argument that nobody reads: models with GELU run with SiLU."""
    return run(*call, **options, steps=steps, glu=lambda gate, up, _: steps.gated(gate, up, "silu"))


@fault("activation", condition="activation='silu'", hidden=("activation=gelu_tanh",))
def gelu_for_silu(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Every model runs with GELU, which is near SiLU for small inputs only."""
    return run(*call, **options, steps=steps, glu=lambda gate, up, _: steps.gated(gate, up, "gelu_tanh"))


@fault("activation", condition="activation='gelu_tanh'", shows={"activation": "gelu_tanh"}, hidden=("activation=silu",))
def gelu_erf_for_tanh(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The exact GELU replaces its tanh approximation: an error of 1e-3 in every activation."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return steps.gated(gate, up, activation) if activation == "silu" else F.gelu(gate) * up

    return run(*call, **options, steps=steps, glu=glu)


@fault("activation")
def activation_dropped(*call: Tensor, **options: Any) -> Tensor:
    """The gate multiplies without its activation."""
    return run(*call, **options, glu=lambda gate, up, _: gate * up)


@fault(
    "activation", source="sgl-project/sglang/pull/39939", condition="|g| or |u| above 7", shows={"data": "huge"},
    hidden=("data=tiny",),
)  # fmt: skip
def swiglu_limit_left_on(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The SwiGLU limit of another model is left on: large activations are clamped at 7."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return steps.gated(gate.clamp(max=7), up.clamp(-7, 7), activation)

    return run(*call, **options, steps=steps, glu=glu)


@fault(
    "activation", source="microsoft/onnxruntime/issues/28738", condition="activation='silu'",
    hidden=("activation=gelu_tanh",),
)  # fmt: skip
def alpha_of_another_model(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The kernel hard-codes sigmoid(1.702 g) of another model."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return gate * torch.sigmoid(1.702 * gate) * up if activation == "silu" else steps.gated(gate, up, activation)

    return run(*call, **options, steps=steps, glu=glu)


@fault("activation", source="sgl-project/DeepGEMM/pull/87")
def up_plus_one(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """One is added to the up half, as another model wants it."""
    return run(*call, **options, steps=steps, glu=lambda gate, up, activation: steps.gated(gate, up + 1, activation))


@fault(
    "activation", source="sgl-project/sglang/issues/16972", condition="T = 1 and activation='gelu_tanh'",
    shows={"T": 1, "activation": "gelu_tanh"}, hidden=("T=2", "activation=silu"),
)  # fmt: skip
def native_path_for_one_token(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A single token takes a native path that knows SiLU only: decoding differs from prefill."""
    if hidden_states.shape[0] == 1:
        options["activation"] = "silu"
    return run(hidden_states, *call, **options)


@fault(
    "activation", condition="a gate above 88.7, with silu", shows={"data": "huge"},
    hidden=("data=normal", "activation=gelu_tanh"),
)  # fmt: skip
def silu_overflows(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """silu written as g * e^g / (1 + e^g) is inf / inf for large gates: NaN."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        if activation != "silu":
            return steps.gated(gate, up, activation)
        power = gate.float().exp()
        return (gate * power / (1 + power)).to(gate.dtype) * up

    return run(*call, **options, steps=steps, glu=glu)


# Weighting ------------------------------------------------------------------------------------------------------


@fault("weighting", source="vllm-project/vllm/pull/43694", condition="weights other than 1", hidden=("k=1",))
def weight_on_input_and_output(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The routing weight is applied to the output and to the input too."""
    return _weight_on_input(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, topk_weights, options)


def _weight_on_input(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    on_output: Tensor, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Each slot becomes a token of its own, scaled by its weight."""
    tokens, slots = topk_ids.shape
    rows = (hidden_states[:, None].to(wide(hidden_states)) * topk_weights[..., None]).flatten(0, 1)
    flat = (topk_ids.reshape(-1, 1), on_output.reshape(-1, 1))
    out = run(rows, gate_up_proj, down_proj, flat[1], flat[0], **options)
    return out.view(tokens, slots, down_proj.shape[1]).sum(1).to(hidden_states.dtype)


@fault("weighting", source="vllm-project/vllm/pull/16744", condition="weights other than 1", hidden=("k=1",))
def weight_before_activation(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The weight multiplies the result of the first projection, before the activation."""
    ones = torch.ones_like(topk_weights)
    return _weight_on_input(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, ones, options)


@fault(
    "weighting", source="NVIDIA/TensorRT-LLM/pull/18018", condition="k = 1", shows={"k": 1, "data": "exact"},
    hidden=("k=2", "data=normal"),
)  # fmt: skip
def single_slot_unweighted(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """With one expert per token the weight is believed to be on the input already: nobody applies it."""

    def unweighted(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return steps.combine(slots, torch.ones_like(topk_weights) if ids.shape[1] == 1 else topk_weights, ids)

    return run(*call, **options, steps=steps, combine=unweighted)


@fault("weighting", condition="weights of a token differ", hidden=("k=1",))
def flat_weights(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Every expert of a token gets the same share of its total weight."""

    def mean(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weights = live(topk_weights, ids, slots.dtype)
        return steps.combine(slots, weights.mean(1, keepdim=True).expand_as(weights), ids)

    return run(*call, **options, steps=steps, combine=mean)


@fault(
    "weighting", source="PaddlePaddle/PaddleFleet/pull/1299", condition="weights that do not sum to 1",
    shows={"data": "exact"}, hidden=("data=normal",),
)  # fmt: skip
def weights_normalised_again(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The caller's weights are normalised again: a scaling factor disappears."""

    def again(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        total = topk_weights.to(slots.dtype).masked_fill(ids < 0, 0).sum(1, keepdim=True)
        return steps.combine(slots, topk_weights / total, ids)

    return run(*call, **options, steps=steps, combine=again)


@fault("weighting", source="vllm-project/vllm-xpu-kernels/pull/66", condition="k > 1", hidden=("k=1",))
def weight_of_first_slot(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The weight is looked up by token instead of by slot."""

    def first_slot(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return steps.combine(slots, topk_weights[:, :1].expand_as(topk_weights), ids)

    return run(*call, **options, steps=steps, combine=first_slot)


@fault("weighting", condition="k > 1 and ids not ascending", shows={"k": 4}, hidden=("k=1",))
def ids_sorted_without_weights(*call: Tensor, **options: Any) -> Tensor:
    """The ids of a row are sorted and the weights are not: experts get each other's weights."""
    return run(*call, **options, locate=lambda ids, expert_map: locate(ids, expert_map).sort(1).values)


@fault("weighting", hidden=("k=1",))
def weight_applied_twice(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The routing weight is squared, once in each of two kernels."""
    return run(
        *call, **options, steps=steps, combine=lambda slots, weights, ids: steps.combine(slots, weights * weights, ids)
    )


@fault("weighting", condition="tokens routed to local expert 0", hidden=("routing=last",))
def one_expert_one_percent_off(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """One expert counts 1 % too much, too little for an elementwise tolerance."""

    def off(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return steps.combine(slots, topk_weights.to(slots.dtype) * torch.where(ids == 0, 1.01, 1.0), ids)

    return run(*call, **options, steps=steps, combine=off)


@fault("weighting", condition="a negative weight", shows={"data": "signed_weights"}, hidden=("data=normal",))
def negative_weights_dropped(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Slots are kept where the weight is above 0: negative weights count as masked."""

    def positive(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return steps.combine(slots, topk_weights.clamp(min=0), ids)

    return run(*call, **options, steps=steps, combine=positive)


@fault("slots", condition="k > 1", shows={"k": 4}, hidden=("k=1",))
def last_slot_dropped(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The last expert of every token is lost."""

    def fewer(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        kept = max(ids.shape[1] - 1, 1)
        return steps.combine(slots[:, :kept], topk_weights[:, :kept], ids[:, :kept])

    return run(*call, **options, steps=steps, combine=fewer)


@fault("slots", source="JieShibo/MoLE/issues/7", condition="k > 8", shows={"k": 10, "E": 12}, hidden=("k=8",))
def slots_beyond_eight_dropped(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """A constant number of 8 slots is summed, whatever k is."""

    def eight(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return steps.combine(slots[:, :8], topk_weights[:, :8], ids[:, :8])

    return run(*call, **options, steps=steps, combine=eight)


@fault(
    "slots", source="ggml-org/llama.cpp/pull/26295", condition="an expert twice in one row",
    shows={"routing": "duplicates"}, hidden=("routing=uniform",),
)  # fmt: skip
def duplicate_slot_dropped(*call: Tensor, **options: Any) -> Tensor:
    """The search for an expert's tokens stops at the first match in a row: a duplicate is lost."""

    def first_match(ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        matches = ids == expert
        return select((matches & (matches.cumsum(1) == 1)).long(), 1)

    return run(*call, **options, select=first_match)


@fault("slots", condition="an expert twice in one row", shows={"routing": "duplicates"}, hidden=("routing=uniform",))
def duplicate_weight_overwritten(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Weights are scattered into a dense [T, E] table without adding: the last duplicate wins."""

    def last_wins(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        later = (ids[:, :, None] == ids[:, None, :]).triu(1).any(2)
        return steps.combine(slots, topk_weights, ids.masked_fill(later, -1))

    return run(*call, **options, steps=steps, combine=last_wins)


@fault("slots", source="vcruz305/vllm-exl3/issues/2", condition="k > 1", hidden=("k=1",))
def one_expert_per_token(*call: Tensor, **options: Any) -> Tensor:
    """Ids are flattened on the way and each row runs its first expert only, with the whole weight."""

    def first_only(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return locate(ids, expert_map)[:, :1].expand_as(ids).clone()

    return run(*call, **options, locate=first_only)
