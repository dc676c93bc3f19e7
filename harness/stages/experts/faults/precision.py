"""Faults of the experts stage in what is rounded, and in promises about bits."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import BLOCK, halves_added_in, matmul_rounding_sums, to_tf32, wide
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, live, locate, run


@fault("precision", condition="bf16 inputs, long sums", shows={"dtype": "bf16", "H": 512}, hidden=("dtype=fp32",))
def bf16_accumulator(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The first projection keeps its running sum in bf16: three digits are left after a long K."""

    def first(rows: Tensor, weight: Tensor) -> Tensor:
        if rows.dtype != torch.bfloat16:
            return steps.matmul(rows, weight)
        return matmul_rounding_sums(rows, weight, torch.bfloat16)

    return run(hidden_states, *call, **options, steps=steps, first=first)


@fault(
    "precision", condition="fp16 inputs", shows={"dtype": "fp16", "H": 512},
    hidden=("dtype=fp32", "dtype=bf16"),
)  # fmt: skip
def fp16_accumulator(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Both projections sum in fp16 for fp16 inputs, as the fast instruction does."""

    def half_sums(rows: Tensor, weight: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float16:
            return steps.matmul(rows, weight)
        return matmul_rounding_sums(rows, weight, torch.float16, block=4)

    return run(hidden_states, *call, **options, steps=steps, first=half_sums, second=half_sums)


@fault("precision", condition="fp32 inputs", hidden=("dtype=bf16",))
def undeclared_tf32(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Operands of fp32 are rounded to tf32 without saying so: 1e-3 instead of 1e-7."""

    def tensor_cores(rows: Tensor, weight: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32:
            return steps.matmul(rows, weight)
        return steps.matmul(to_tf32(rows), to_tf32(weight))

    return run(hidden_states, *call, **options, steps=steps, first=tensor_cores, second=tensor_cores)


@fault("precision", condition="fp32 inputs", hidden=("dtype=bf16",))
def fp32_computed_in_bf16(hidden: Tensor, gate_up: Tensor, down: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """fp32 inputs are converted to bf16 since that is what the kernel was written for."""
    narrow = [t.bfloat16() if t.dtype == torch.float32 else t for t in (hidden, gate_up, down)]
    return run(*narrow, *call, **options).to(hidden.dtype)


@fault("precision", shows={"dtype": "bf16"})
def activation_through_fp8(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The activation is stored in fp8 between the projections of a model that is not quantised."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        hidden = steps.gated(gate, up, activation)
        return hidden.to(torch.float8_e4m3fn).to(hidden.dtype)

    return run(*call, **options, steps=steps, glu=glu)


@fault(
    "precision", condition="an activation above 65504, or fp32 inputs", shows={"dtype": "bf16", "data": "huge"},
    hidden=("data=normal",),
)  # fmt: skip
def activation_stored_in_fp16(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The intermediate buffer is fp16 whatever the model is: large activations become infinite."""

    def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        hidden = steps.gated(gate, up, activation)
        return hidden.half().to(hidden.dtype)

    return run(*call, **options, steps=steps, glu=glu)


@fault(
    "precision", source="NVIDIA/Megatron-LM/pull/6458", condition="fp32 or fp16 inputs, k > 1", shows={"k": 4},
    hidden=("bf16 inputs, where partial sums may be rounded to bf16",),
)  # fmt: skip
def combined_in_bf16(*call: Tensor, **options: Any) -> Tensor:
    """The slots are summed in bf16, which only a bf16 model may do."""

    def running(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        weighted = (live(topk_weights, ids, slots.dtype)[..., None] * slots).bfloat16()
        total = torch.zeros_like(weighted[:, 0])
        for slot in weighted.unbind(1):
            total = total + slot
        return total

    return run(*call, **options, combine=running)


@fault(
    "precision", condition="16-bit inputs, k > 2, slots that cancel",
    shows={"dtype": "bf16", "data": "partial_sums", "k": 4}, rounds=("activation", "weighted"),
    hidden=("dtype=fp32", "data=normal"),
)  # fmt: skip
def slots_summed_in_the_inputs_dtype(*call: Tensor, **options: Any) -> Tensor:
    """Each slot's share is added to the output in memory, in 16 bits, where only other roundings are declared."""

    def running(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        total = torch.zeros_like(slots[:, 0], dtype=call[0].dtype)
        for slot in (live(topk_weights, ids, slots.dtype)[..., None] * slots).unbind(1):
            total = (total.to(slot.dtype) + slot).to(total.dtype)
        return total

    return run(*call, **options, combine=running)


@fault(
    "precision", source="flagos-ai/FlagGems/pull/5876", condition="16-bit inputs, sums that are larger on their way",
    shows={"dtype": "bf16", "data": "deep_sums"}, hidden=("dtype=fp32", "data=normal"),
)  # fmt: skip
def depth_split_in_16_bits(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Each half of the depth has a program of its own, and the two add their shares in memory, in 16 bits."""
    product = halves_added_in(hidden_states.dtype, steps.matmul)
    return run(hidden_states, *call, **options, steps=steps, first=product, second=product)


@fault("precision", condition="fp32 or fp16 inputs", hidden=("dtype=bf16",))
def weights_cast_to_bf16(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Routing weights are cast to bf16 whatever the model's dtype is."""
    return run(
        *call, **options, steps=steps, combine=lambda slots, weights, ids: steps.combine(slots, weights.bfloat16(), ids)
    )


@fault(
    "precision", source="microsoft/Tutel/issues/196", condition="fp16 and H odd", shows={"dtype": "fp16", "H": 33},
    hidden=("dtype=fp32", "H=32"),
)  # fmt: skip
def fp16_pairs_without_tail(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """fp16 values are handled in pairs without a tail: the last odd column is lost."""
    out = run(hidden_states, *call, **options)
    if out.dtype == torch.float16 and out.shape[1] % 2:
        out[:, -1] = 0
    return out


@fault(
    "bits", source="vllm-project/vllm/issues/56887", condition="two equal calls, k > 2",
    shows={"dtype": "bf16", "k": 6, "T": 33}, sign="repeat", stateful=True, deterministic=True, hidden=("k=1",),
)  # fmt: skip
def sixteen_bit_atomics(*call: Tensor, **options: Any) -> Tensor:
    """Partial sums meet in 16-bit atomics in the order of arrival: greedy text changes from run to run."""

    def arrival(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        kind = call[0].dtype
        weighted = live(topk_weights, ids, slots.dtype)[..., None] * slots
        total = torch.zeros_like(weighted[:, 0], dtype=kind)
        for slot in weighted.roll(_calls["sixteen_bit_atomics"], 1).unbind(1):
            total = (total.to(slot.dtype) + slot).to(kind)
        return total

    _calls["sixteen_bit_atomics"] += 1
    return run(*call, **options, combine=arrival)


_calls = {"sixteen_bit_atomics": 0}  # stands for the scheduler, which starts the programs in another order each time


@fault(
    "bits", source="vllm-project/vllm/pull/36488", condition="the same row in another batch size",
    shows={"T": 33, "H": 64}, sign="batch", batch_invariant=True, hidden=("at most 16 tokens",),
)  # fmt: skip
def splits_follow_the_batch(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The number of K splits follows the batch: a row's bits depend on who else is served."""

    def split_sums(rows: Tensor, weight: Tensor) -> Tensor:
        if hidden_states.shape[0] <= BLOCK:
            return steps.matmul(rows, weight)
        return matmul_rounding_sums(rows, weight, wide(rows))

    return run(hidden_states, *call, **options, steps=steps, first=split_sums)


@fault(
    "bits", source="sgl-project/sglang/pull/35766", condition="padding tokens in the batch",
    shows={"masked": "rows", "T": 9}, hidden=("masked=none",),
)  # fmt: skip
def padding_rows_shift_the_others(*call: Tensor, **options: Any) -> Tensor:
    """Rows that are padding take part with a real expert's mean and shift the others."""
    out = run(*call, **options)
    padding = (locate(call[4], options.get("expert_map")) < 0).all(1)
    if padding.any() and not padding.all():
        out[~padding] += 0.01 * call[0][padding].mean(0)[: out.shape[1]]
    return out
