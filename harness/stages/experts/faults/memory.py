"""Faults of the experts stage in what it keeps, shares or overwrites, and in what it returns."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import flat_storage, unwritten_like, wide
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, halves, run

# What the faults below keep between calls, by fault and shape.  A right implementation keeps nothing.
_kept: dict[tuple[Any, ...], Any] = {}


def _key(name: str, *tensors: Tensor) -> tuple[Any, ...]:
    return (name, *((tuple(t.shape), t.dtype, t.device) for t in tensors))


@fault("inputs", source="vllm-project/vllm/pull/26497", sign="inputs")
def result_over_input(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The result is written over hidden_states, which the shared expert still has to read."""
    return hidden_states.copy_(run(hidden_states, *call, **options))


@fault("inputs", condition="an id of -1", shows={"masked": "some"}, sign="inputs", hidden=("masked=none",))
def ids_masked_in_place(*call: Tensor, **options: Any) -> Tensor:
    """The caller's ids are localised in place: the next layer or the statistics read other ids."""
    out = run(*call, **options)
    call[4].clamp_(min=0)
    return out


@fault("inputs", condition="weights that do not sum to 1", sign="inputs")
def weights_normalised_in_place(*call: Tensor, **options: Any) -> Tensor:
    """The caller's routing weights are normalised in place after use."""
    out = run(*call, **options)
    call[3].div_(call[3].sum(1, keepdim=True))
    return out


@fault("inputs", condition="I > 1", sign="inputs")
def weights_shuffled_in_place(hidden_states: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Weights are shuffled in place into the kernel's layout: every other user of them is broken."""
    out = run(hidden_states, gate_up, *call, **options)
    gate_up.copy_(gate_up.flip(1))
    return out


@fault(
    "guards", source="ROCm/aiter/pull/2547", condition="rows of hidden_states padded",
    shows={"layout": "hidden_states:padded"}, sign="guards", hidden=("layout=",),
)  # fmt: skip
def padding_behind_rows_zeroed(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Padding behind the rows is zeroed: memory that belongs to somebody else."""
    out = run(hidden_states, *call, **options)
    rows, columns = hidden_states.shape
    gap = hidden_states.stride(0) - columns if rows > 1 and hidden_states.stride(1) == 1 else 0
    if gap > 0:
        start = hidden_states.storage_offset() + columns
        torch.as_strided(hidden_states, (rows - 1, gap), (columns + gap, 1), start).zero_()
    return out


@fault("state", condition="a second call with the same shapes", sign="earlier", stateful=True)
def output_buffer_reused(*call: Tensor, **options: Any) -> Tensor:
    """One output buffer per shape is handed out again and again: earlier results change."""
    right = run(*call, **options)
    return _kept.setdefault(_key("output", right), unwritten_like(right)).copy_(right)


@fault("state", condition="every slot masked", shows={"masked": "all"}, sign="earlier", hidden=("masked=none",))
def input_returned_if_idle(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """With nothing to do the input itself is handed back: wrong, and a view of the input."""
    if bool((call[3] < 0).all()):
        return hidden_states.view_as(hidden_states)
    return run(hidden_states, *call, **options)


@fault(
    "state", condition="an earlier call of the same shape, then masked slots",
    shows={"masked": "some"}, before={"masked": "none"}, stateful=True,
)  # fmt: skip
def workspace_not_cleared(hidden: Tensor, gate_up: Tensor, down: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The workspace is not cleared: masked slots add what the last call left there."""

    def summed(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return (topk_weights.to(slots.dtype).nan_to_num(0.0)[..., None] * slots).sum(1)

    shape = (*call[1].shape, down.shape[1])
    slots = _kept.setdefault(_key("workspace", hidden, call[1], down), hidden.new_zeros(shape, dtype=wide(hidden)))
    return run(hidden, gate_up, down, *call, **options, slots=slots, combine=summed)


@fault(
    "state", source="flashinfer-ai/flashinfer/issues/1856", condition="a second call with more tokens",
    shows={"variant": "poisoned"}, before={"T": 3}, stateful=True,
)  # fmt: skip
def descriptor_of_first_shape(hidden_states: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The descriptor of the first problem is reused: rows beyond its size are not written."""
    right = run(hidden_states, gate_up, *call, **options)
    rows = _kept.setdefault(_key("descriptor", gate_up), right.shape[0])
    out = unwritten_like(right)
    out[:rows] = right[:rows]
    return out


@fault(
    "state", condition="a second call with the same shapes and other ids", before={"seed": 1},
    stateful=True,
)  # fmt: skip
def plan_cached_by_shape(*call: Tensor, **options: Any) -> Tensor:
    """The sorting plan is cached by shape: the second batch goes to the first one's experts."""
    *rest, topk_ids = call
    return run(*rest, _kept.setdefault(_key("plan", *call), topk_ids.clone()), **options)


@fault(
    "state", source="NVIDIA-NeMo/Automodel/pull/2722", condition="other weights, same shape",
    before={"seed": 1}, stateful=True,
)  # fmt: skip
def weights_of_first_load(hidden: Tensor, gate_up: Tensor, down: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Weights are copied at first use and the copy is never updated by a load."""
    first = _kept.setdefault(_key("load", gate_up, down), (gate_up.clone(), down.clone()))
    return run(hidden, *first, *call, **options)


@fault(
    "state", source="NovaSky-AI/SkyRL/issues/1680", condition="other weights, same shape",
    before={"seed": 1}, stateful=True,
)  # fmt: skip
def second_load_in_kernel_layout(hidden_states: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A second load writes [gate; up] into memory that the kernel reads as [up; gate]."""
    first = _kept.setdefault(_key("layout", gate_up), gate_up.clone())
    if torch.equal(first.nan_to_num(), gate_up.nan_to_num()):
        return run(hidden_states, gate_up, *call, **options)
    return run(hidden_states, gate_up, *call, **options, split=lambda rows: halves(rows)[::-1])


@fault("tuning", source="triton-lang/triton/issues/6547", condition="the first call of a shape", stateful=True)
def tuning_accumulates(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """Tuning runs the accumulating kernel three times on the real output."""
    key = _key("tuned", *call[:2])
    times = 1 if key in _kept else 3
    _kept[key] = True
    return run(
        *call, **options, steps=steps, combine=lambda slots, weights, ids: steps.combine(slots, weights, ids) * times
    )


@fault(
    "tuning", source="triton-lang/triton/issues/7181", condition="the second call of a shape",
    before={"seed": 1}, stateful=True,
)  # fmt: skip
def accumulator_never_reset(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The split-K accumulator is zeroed while tuning and never again: calls add up."""

    def added(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        total = steps.combine(slots, topk_weights, ids)
        kept = _kept.setdefault(_key("accumulator", total), torch.zeros_like(total))
        return kept.add_(total).clone()

    return run(*call, **options, steps=steps, combine=added)


@fault("contract", condition="16-bit inputs", shows={"dtype": "bf16"}, sign="dtype", hidden=("dtype=fp32",))
def returns_fp32(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The fp32 sums are returned without the cast to the input dtype."""
    return run(hidden_states.to(wide(hidden_states)), *call, **options)


@fault("contract", source="sgl-project/sglang/pull/26188", sign="shape")
def returns_extra_dimension(*call: Tensor, **options: Any) -> Tensor:
    """The result has one dimension too many on a fallback path."""
    return run(*call, **options)[None]


@fault("contract", sign="shape")
def returns_pair(*call: Tensor, **options: Any) -> Any:
    """The workspace is returned beside the output."""
    out = run(*call, **options)
    return out, unwritten_like(out)


@fault("contract", condition="T odd", shows={"T": 5}, sign="raises", hidden=("T=6",))
def asserts_even_tokens(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """An assertion about packing ends the call for odd batches instead of a rejection."""
    assert hidden_states.shape[0] % 2 == 0, "tokens are packed in pairs"
    return run(hidden_states, *call, **options)


@fault(
    "contract", source="pytorch/pytorch/pull/192497", condition="T = 0", shows={"T": 0}, sign="raises", hidden=("T=1",)
)
def raises_without_tokens(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A batch without tokens fails in the stride validation."""
    if not hidden_states.shape[0]:
        raise RuntimeError("strides of the first operand must be multiples of 16 bytes")
    return run(hidden_states, *call, **options)


@fault(
    "contract", condition="fp16 inputs, which it declares", shows={"dtype": "fp16"}, sign="raises",
    hidden=("dtype=fp32",), dtypes=("fp32", "fp16", "bf16"),
)  # fmt: skip
def declares_a_dtype_it_lacks(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """A dtype that is declared dies inside the kernel."""
    if hidden_states.dtype == torch.float16:
        raise RuntimeError('"fused_moe" not implemented for Half')
    return run(hidden_states, *call, **options)


@fault(
    "guards", condition="hidden_states is a slice at the start of a wider buffer",
    shows={"layout": "hidden_states:padded"}, sign="guards",
)  # fmt: skip
def one_element_behind_the_last_row(hidden_states: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The kernel stores one element behind its last row."""
    out = run(hidden_states, *call, **options)
    if hidden_states.numel():
        steps = zip(hidden_states.shape, hidden_states.stride(), strict=True)
        behind = hidden_states.storage_offset() + sum((size - 1) * stride for size, stride in steps) + 1
        flat_storage(hidden_states)[behind : behind + 1] = 0
    return out
