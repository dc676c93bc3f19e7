"""Faults of the shared expert's gate: y = sigmoid(x . w) * shared_output."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import (
    halves_added_in,
    matmul_rounding_sums,
    read_as_contiguous,
    read_past,
    round_down,
    round_up,
    to_tf32,
    unwritten_like,
    wide,
)
from moe_harness.harness.stages.shared_expert_gate.faults._steps import RIGHT, Steps, run


@fault("gate", source="NousResearch/torchtitan/pull/36")
def gate_dropped(*call: Tensor, **steps: Any) -> Tensor:
    """The gate is loaded and never used: the shared expert counts in full."""
    return run(*call, **steps, squash=torch.ones_like)


@fault("gate")
def sigmoid_dropped(*call: Tensor, **steps: Any) -> Tensor:
    """The logit multiplies without the sigmoid."""
    return run(*call, **steps, squash=lambda logit: logit)


@fault("gate")
def silu_for_sigmoid(*call: Tensor, **steps: Any) -> Tensor:
    """SiLU stands in for the sigmoid: the gate grows without bound."""
    return run(*call, **steps, squash=torch.nn.functional.silu)


@fault("gate")
def gate_inverted(*call: Tensor, **steps: Any) -> Tensor:
    """1 - sigmoid: the gate is closed where it should be open."""
    return run(*call, **steps, squash=lambda logit: torch.sigmoid(-logit))


@fault("gate", condition="a logit beyond +-2.5", hidden=("data=exact",))
def hard_sigmoid(*call: Tensor, **steps: Any) -> Tensor:
    """A hard sigmoid replaces the sigmoid, equal only around 0 and far out."""
    return run(
        *call, **steps, squash=lambda x: torch.where(x.abs() < 0.5, x.sigmoid(), torch.nn.functional.hardsigmoid(x))
    )


@fault("gate", condition="a logit above 88.7", shows={"data": "saturated"}, hidden=("data=normal",))
def sigmoid_overflows(*call: Tensor, **steps: Any) -> Tensor:
    """e^x / (1 + e^x) is inf / inf for large logits."""
    return run(*call, **steps, squash=lambda logit: logit.exp() / (1 + logit.exp()))


@fault("rows", condition="two or more tokens", hidden=("lead=1",))
def gate_of_first_token(*call: Tensor, **steps: Any) -> Tensor:
    """One gate, the first token's, scales all rows."""

    def first(gate: Tensor, shared: Tensor) -> Tensor:
        flat = gate.reshape(-1, 1)
        return (flat[:1] if len(flat) else flat) * shared

    return run(*call, **steps, scale=first)


@fault(
    "rows", condition="three or more dimensions, first one above 1", shows={"lead": "2x3"},
    hidden=("lead=5", "lead=1x3"),
)  # fmt: skip
def gates_of_first_batch_row(*call: Tensor, **steps: Any) -> Tensor:
    """Leading dimensions are flattened wrongly: every batch row gets the first one's gates."""
    return run(*call, **steps, scale=lambda gate, shared: (gate[:1] if gate.dim() > 2 else gate) * shared)


@fault("rows", condition="an odd number of tokens above 1", shows={"lead": "5"}, hidden=("lead=6", "lead=1"))
def odd_row_ungated(*call: Tensor, **steps: Any) -> Tensor:
    """Rows are handled in pairs: the last one is passed on without its gate."""

    def pairs(gate: Tensor, shared: Tensor) -> Tensor:
        flat = gate.reshape(-1).clone()
        if len(flat) > 1 and len(flat) % 2:
            flat[-1] = 1
        return flat.view(gate.shape) * shared

    return run(*call, **steps, scale=pairs)


@fault("rows", condition="more than 32768 tokens", shows={"lead": "32769", "H": 4, "D": 4}, hidden=("lead=32768",))
def rows_beyond_32768_zero(*call: Tensor, **steps: Any) -> Tensor:
    """The grid is limited to 32768 programs: rows beyond come out as 0."""
    out = run(*call, **steps).contiguous()
    out.view(-1, out.shape[-1])[32768:] = 0
    return out


@fault(
    "strides", source="vllm-project/vllm/pull/43190", condition="rows of hidden_states padded",
    shows={"layout": "hidden_states:padded"}, hidden=("layout=",),
)  # fmt: skip
def hidden_row_stride_assumed(hidden_states: Tensor, *call: Tensor, **steps: Any) -> Tensor:
    """x is read at row * H: a slice of a wider buffer gives other rows."""
    return run(read_as_contiguous(hidden_states), *call, **steps)


@fault(
    "strides", source="vllm-project/vllm/pull/43190", condition="rows of shared_output padded",
    shows={"layout": "shared_output:padded"}, hidden=("layout=",),
)  # fmt: skip
def shared_row_stride_assumed(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, **steps: Any
) -> Tensor:
    """shared_output is read at row * D: a slice of a wider buffer gives other rows."""
    return run(hidden_states, gate_weight, read_as_contiguous(shared_output), **steps)


@fault(
    "strides", condition="gate_weight with a column stride", shows={"layout": "gate_weight:strided"},
    hidden=("layout=",),
)  # fmt: skip
def gate_weight_stride_assumed(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, **steps: Any
) -> Tensor:
    """The gate's weight is read as contiguous although it is a column of a matrix."""
    return run(hidden_states, read_as_contiguous(gate_weight), shared_output, **steps)


@fault("tiles", condition="H not a multiple of 16", shows={"H": 40}, hidden=("H=48",))
def h_tail_dropped(*call: Tensor, steps: Steps = RIGHT) -> Tensor:
    """The last, partial block of H does not enter the dot product."""

    def floored(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        kept = round_down(hidden_states.shape[-1])
        return steps.dot(hidden_states[..., :kept], gate_weight[:, :kept])

    return run(*call, steps=steps, dot=floored)


@fault(
    "tiles", source="triton-lang/triton/issues/630",
    condition="H not a multiple of 16, NaN or infinity behind the rows of hidden_states",
    shows={"H": 40, "layout": "hidden_states:padded"}, hidden=("H=48",),  # memory is fenced in: no layout hides it
)  # fmt: skip
def h_tail_masked_on_one_side(*call: Tensor, steps: Steps = RIGHT) -> Tensor:
    """Only the weight is masked in the tail of H: 0 times NaN."""

    def unmasked(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        width = round_up(hidden_states.shape[-1])
        weight = torch.nn.functional.pad(gate_weight, (0, width - gate_weight.shape[-1]))
        return steps.dot(read_past(hidden_states, width), weight)

    return run(*call, steps=steps, dot=unmasked)


@fault(
    "tiles", condition="D not a multiple of 16, dirty memory", shows={"D": 40, "variant": "poisoned"}, hidden=("D=48",)
)
def d_tail_unwritten(*call: Tensor, **steps: Any) -> Tensor:
    """The grid is D // block: the last columns are never written."""
    right = run(*call, **steps)
    out = unwritten_like(right)
    kept = round_down(right.shape[-1])
    out[..., :kept] = right[..., :kept]
    return out


@fault("shapes", condition="D > H", shows={"H": 32, "D": 48}, hidden=("D=32", "D=16"))
def columns_beyond_h_ungated(*call: Tensor, **steps: Any) -> Tensor:
    """The loop over columns ends at H: further columns are passed on without the gate."""
    columns = call[0].shape[-1]

    def partly(gate: Tensor, shared: Tensor) -> Tensor:
        return torch.cat((gate * shared[..., :columns], shared[..., columns:]), -1)

    return run(*call, **steps, scale=partly)


@fault("shapes", condition="D == H", shows={"H": 32, "D": 32}, hidden=("D=48",))
def gate_from_output(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, **steps: Any) -> Tensor:
    """The gate is computed from the shared expert's output instead of its input."""
    fits = shared_output.shape == hidden_states.shape
    return run((shared_output if fits else hidden_states).to(hidden_states.dtype), gate_weight, shared_output, **steps)


@fault("precision", condition="bf16 inputs, long H", shows={"dtype": "bf16", "H": 1024}, hidden=("dtype=fp32",))
def bf16_dot_product(*call: Tensor, steps: Steps = RIGHT) -> Tensor:
    """The dot product keeps its running sum in bf16."""

    def rounded(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        if hidden_states.dtype != torch.bfloat16:
            return steps.dot(hidden_states, gate_weight)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        sums = matmul_rounding_sums(flat, gate_weight, torch.bfloat16, block=4)
        return sums.view(*hidden_states.shape[:-1], 1)

    return run(*call, steps=steps, dot=rounded)


@fault(
    "precision", condition="16-bit inputs, sums that are larger on their way",
    shows={"dtype": "bf16", "data": "deep_sums"}, hidden=("dtype=fp32", "data=normal"),
)  # fmt: skip
def dot_product_split_in_16_bits(hidden_states: Tensor, *call: Tensor, steps: Steps = RIGHT) -> Tensor:
    """Each half of the dot product has a program of its own, and the two are added in memory, in 16 bits."""
    return run(hidden_states, *call, steps=steps, dot=halves_added_in(hidden_states.dtype, steps.dot))


@fault("precision", condition="fp32 inputs", hidden=("dtype=bf16",))
def gate_in_tf32(*call: Tensor, steps: Steps = RIGHT) -> Tensor:
    """fp32 operands are rounded to tf32 without saying so."""

    def tensor_cores(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32:
            return steps.dot(hidden_states, gate_weight)
        return steps.dot(to_tf32(hidden_states), to_tf32(gate_weight))

    return run(*call, steps=steps, dot=tensor_cores)


@fault("special values", condition="NaN in one token", shows={"data": "row_nan"}, hidden=("data=normal",))
def gate_swallows_nan(*call: Tensor, **steps: Any) -> Tensor:
    """NaN is replaced by 0 on the way out."""
    return run(*call, **steps).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


@fault("inputs", source="vllm-project/vllm/pull/33375", sign="inputs")
def shared_output_overwritten(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, **steps: Any
) -> Tensor:
    """The result is written over shared_output."""
    return shared_output.copy_(run(hidden_states, gate_weight, shared_output, **steps))


@fault("contract", condition="16-bit inputs", shows={"dtype": "bf16"}, sign="dtype", hidden=("dtype=fp32",))
def gate_returns_fp32(hidden_states: Tensor, *call: Tensor, **steps: Any) -> Tensor:
    """The fp32 product is returned without the cast."""
    return run(hidden_states.to(wide(hidden_states)), *call, **steps)


@fault("contract", condition="three or more dimensions", shows={"lead": "2x3"}, sign="shape", hidden=("lead=5",))
def leading_dimensions_lost(*call: Tensor, **steps: Any) -> Tensor:
    """The result keeps its rows flattened."""
    return run(*call, **steps).reshape(-1, call[2].shape[-1])


@fault("contract", condition="no token", shows={"lead": "0"}, sign="raises", hidden=("lead=1",))
def gate_raises_without_tokens(hidden_states: Tensor, *call: Tensor, **steps: Any) -> Tensor:
    """The largest logit of an empty batch is asked for."""
    hidden_states.max()
    return run(hidden_states, *call, **steps)
