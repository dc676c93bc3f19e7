"""Faults of the shared expert's gate: y = sigmoid(x . w) * shared_output.

`run` is a right implementation whose every step can be replaced.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import (
    matmul_rounding_sums,
    read_as_contiguous,
    read_past,
    round_down,
    round_up,
    to_tf32,
    unwritten_like,
    wide,
)

BUGS = "https://github.com/"


def dot(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
    """The gate's logit, [..., 1], in fp32 or wider."""
    kind = wide(hidden_states)
    return hidden_states.to(kind) @ gate_weight.to(kind).T


def run(
    hidden_states: Tensor,
    gate_weight: Tensor,
    shared_output: Tensor,
    *,
    dot: Callable[[Tensor, Tensor], Tensor] = dot,
    squash: Callable[[Tensor], Tensor] = torch.sigmoid,
    scale: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """A right implementation; every keyword replaces one of its steps."""
    gate = squash(dot(hidden_states, gate_weight))
    return scale(gate, shared_output.to(gate.dtype)).to(hidden_states.dtype)


@fault(
    "shared_expert_gate",
    "gate",
    source=BUGS + "NousResearch/torchtitan/pull/36",
    condition="always",
    shows={},
    consequence="The gate is loaded and never used: the shared expert counts in full.",
)
def gate_dropped(*call: Tensor) -> Tensor:
    return run(*call, squash=torch.ones_like)


@fault(
    "shared_expert_gate", "gate", condition="always", shows={}, consequence="The logit multiplies without the sigmoid."
)
def sigmoid_dropped(*call: Tensor) -> Tensor:
    return run(*call, squash=lambda logit: logit)


@fault(
    "shared_expert_gate",
    "gate",
    condition="always",
    shows={},
    consequence="SiLU stands in for the sigmoid: the gate grows without bound.",
)
def silu_for_sigmoid(*call: Tensor) -> Tensor:
    return run(*call, squash=torch.nn.functional.silu)


@fault(
    "shared_expert_gate",
    "gate",
    condition="always",
    shows={},
    consequence="1 - sigmoid: the gate is closed where it should be open.",
)
def gate_inverted(*call: Tensor) -> Tensor:
    return run(*call, squash=lambda logit: torch.sigmoid(-logit))


@fault(
    "shared_expert_gate",
    "gate",
    condition="a logit beyond +-2.5",
    shows={"gain": 4.0},
    hidden=("gain=0.01",),
    consequence="A hard sigmoid replaces the sigmoid, equal only around 0 and far out.",
)
def hard_sigmoid(*call: Tensor) -> Tensor:
    return run(*call, squash=lambda x: torch.where(x.abs() < 0.5, x.sigmoid(), torch.nn.functional.hardsigmoid(x)))


@fault(
    "shared_expert_gate",
    "gate",
    condition="a logit above 88.7",
    shows={"gain": 400.0},
    hidden=("gain=1.0",),
    consequence="e^x / (1 + e^x) is inf / inf for large logits.",
)
def sigmoid_overflows(*call: Tensor) -> Tensor:
    return run(*call, squash=lambda logit: logit.exp() / (1 + logit.exp()))


@fault(
    "shared_expert_gate",
    "rows",
    condition="two or more tokens",
    shows={},
    hidden=("lead=(1,)",),
    consequence="One gate, the first token's, scales all rows.",
)
def gate_of_first_token(*call: Tensor) -> Tensor:
    def first(gate: Tensor, shared: Tensor) -> Tensor:
        flat = gate.reshape(-1, 1)
        return (flat[:1] if len(flat) else flat) * shared

    return run(*call, scale=first)


@fault(
    "shared_expert_gate",
    "rows",
    condition="three or more dimensions, first one above 1",
    shows={"lead": (2, 3)},
    hidden=("lead=(5,)", "lead=(1, 3)"),
    consequence="Leading dimensions are flattened wrongly: every batch row gets the first one's gates.",
)
def gates_of_first_batch_row(*call: Tensor) -> Tensor:
    return run(*call, scale=lambda gate, shared: (gate[:1] if gate.dim() > 2 else gate) * shared)


@fault(
    "shared_expert_gate",
    "rows",
    condition="an odd number of tokens above 1",
    shows={"lead": (5,)},
    hidden=("lead=(6,)", "lead=(1,)"),
    consequence="Rows are handled in pairs: the last one is passed on without its gate.",
)
def odd_row_ungated(*call: Tensor) -> Tensor:
    def pairs(gate: Tensor, shared: Tensor) -> Tensor:
        flat = gate.reshape(-1).clone()
        if len(flat) > 1 and len(flat) % 2:
            flat[-1] = 1
        return flat.view(gate.shape) * shared

    return run(*call, scale=pairs)


@fault(
    "shared_expert_gate",
    "rows",
    condition="more than 32768 tokens",
    shows={"lead": (32769,), "H": 4, "D": 4},
    hidden=("lead=(32768,)",),
    consequence="The grid is limited to 32768 programs: rows beyond come out as 0.",
)
def rows_beyond_32768_zero(*call: Tensor) -> Tensor:
    out = run(*call)
    out.view(-1, out.shape[-1])[32768:] = 0
    return out


@fault(
    "shared_expert_gate",
    "strides",
    source=BUGS + "vllm-project/vllm/pull/43190",
    condition="rows of hidden_states padded",
    shows={"layout": "padded_rows"},
    hidden=("layout='contiguous'",),
    consequence="x is read at row * H: a slice of a wider buffer gives other rows.",
)
def hidden_row_stride_assumed(hidden_states: Tensor, *call: Tensor) -> Tensor:
    return run(read_as_contiguous(hidden_states), *call)


@fault(
    "shared_expert_gate",
    "strides",
    source=BUGS + "vllm-project/vllm/pull/43190",
    condition="rows of shared_output padded",
    shows={"layout": "padded_output"},
    hidden=("layout='contiguous'",),
    consequence="shared_output is read at row * D: a slice of a wider buffer gives other rows.",
)
def shared_row_stride_assumed(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    return run(hidden_states, gate_weight, read_as_contiguous(shared_output))


@fault(
    "shared_expert_gate",
    "strides",
    condition="gate_weight with a column stride",
    shows={"layout": "strided_gate"},
    hidden=("layout='contiguous'",),
    consequence="The gate's weight is read as contiguous although it is a column of a matrix.",
)
def gate_weight_stride_assumed(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    return run(hidden_states, read_as_contiguous(gate_weight), shared_output)


@fault(
    "shared_expert_gate",
    "tiles",
    condition="H not a multiple of 16",
    shows={"H": 40},
    hidden=("H=48",),
    consequence="The last, partial block of H does not enter the dot product.",
)
def h_tail_dropped(*call: Tensor) -> Tensor:
    def floored(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        kept = round_down(hidden_states.shape[-1])
        return dot(hidden_states[..., :kept], gate_weight[:, :kept])

    return run(*call, dot=floored)


@fault(
    "shared_expert_gate",
    "tiles",
    source=BUGS + "triton-lang/triton/issues/630",
    condition="H not a multiple of 16, NaN or infinity behind the rows of hidden_states",
    shows={"H": 40, "layout": "padded_rows"},
    hidden=("layout='contiguous'", "H=48"),
    consequence="Only the weight is masked in the tail of H: 0 times NaN.",
)
def h_tail_masked_on_one_side(*call: Tensor) -> Tensor:
    def unmasked(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        width = round_up(hidden_states.shape[-1])
        weight = torch.nn.functional.pad(gate_weight, (0, width - gate_weight.shape[-1]))
        return dot(read_past(hidden_states, width), weight)

    return run(*call, dot=unmasked)


@fault(
    "shared_expert_gate",
    "tiles",
    condition="D not a multiple of 16, dirty memory",
    shows={"D": 40, "poison": True},
    hidden=("D=48",),
    consequence="The grid is D // block: the last columns are never written.",
)
def d_tail_unwritten(*call: Tensor) -> Tensor:
    right = run(*call)
    out = unwritten_like(right)
    kept = round_down(right.shape[-1])
    out[..., :kept] = right[..., :kept]
    return out


@fault(
    "shared_expert_gate",
    "shapes",
    condition="D > H",
    shows={"H": 32, "D": 48},
    hidden=("D=32", "D=16"),
    consequence="The loop over columns ends at H: further columns are passed on without the gate.",
)
def columns_beyond_h_ungated(*call: Tensor) -> Tensor:
    columns = call[0].shape[-1]

    def partly(gate: Tensor, shared: Tensor) -> Tensor:
        return torch.cat((gate * shared[..., :columns], shared[..., columns:]), -1)

    return run(*call, scale=partly)


@fault(
    "shared_expert_gate",
    "shapes",
    condition="D == H",
    shows={"H": 32, "D": 32},
    hidden=("D=48",),
    consequence="The gate is computed from the shared expert's output instead of its input.",
)
def gate_from_output(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    fits = shared_output.shape == hidden_states.shape
    return run((shared_output if fits else hidden_states).to(hidden_states.dtype), gate_weight, shared_output)


@fault(
    "shared_expert_gate",
    "precision",
    condition="bf16 inputs, long H",
    shows={"dtype": "bfloat16", "H": 1024},
    hidden=("dtype='float32'",),
    consequence="The dot product keeps its running sum in bf16.",
)
def bf16_dot_product(*call: Tensor) -> Tensor:
    def rounded(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        if hidden_states.dtype != torch.bfloat16:
            return dot(hidden_states, gate_weight)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        sums = matmul_rounding_sums(flat, gate_weight, torch.bfloat16, block=4)
        return sums.view(*hidden_states.shape[:-1], 1)

    return run(*call, dot=rounded)


@fault(
    "shared_expert_gate",
    "precision",
    condition="fp32 inputs",
    shows={},
    hidden=("dtype='bfloat16'",),
    consequence="fp32 operands are rounded to tf32 without saying so.",
)
def gate_in_tf32(*call: Tensor) -> Tensor:
    def tensor_cores(hidden_states: Tensor, gate_weight: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32:
            return dot(hidden_states, gate_weight)
        return dot(to_tf32(hidden_states), to_tf32(gate_weight))

    return run(*call, dot=tensor_cores)


@fault(
    "shared_expert_gate",
    "special values",
    condition="NaN in one token",
    shows={"special": "nan_token"},
    hidden=("special=None",),
    consequence="NaN is replaced by 0 on the way out.",
)
def gate_swallows_nan(*call: Tensor) -> Tensor:
    return run(*call).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


@fault(
    "shared_expert_gate",
    "inputs",
    source=BUGS + "vllm-project/vllm/pull/33375",
    condition="always",
    sign="inputs",
    shows={},
    consequence="The result is written over shared_output.",
)
def shared_output_overwritten(hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor) -> Tensor:
    return shared_output.copy_(run(hidden_states, gate_weight, shared_output))


@fault(
    "shared_expert_gate",
    "contract",
    condition="16-bit inputs",
    sign="dtype",
    shows={"dtype": "bfloat16"},
    hidden=("dtype='float32'",),
    consequence="The fp32 product is returned without the cast.",
)
def gate_returns_fp32(hidden_states: Tensor, *call: Tensor) -> Tensor:
    return run(hidden_states.to(wide(hidden_states)), *call)


@fault(
    "shared_expert_gate",
    "contract",
    condition="three or more dimensions",
    sign="shape",
    shows={"lead": (2, 3)},
    hidden=("lead=(5,)",),
    consequence="The result keeps its rows flattened.",
)
def leading_dimensions_lost(*call: Tensor) -> Tensor:
    return run(*call).reshape(-1, call[2].shape[-1])


@fault(
    "shared_expert_gate",
    "contract",
    condition="no token",
    sign="raises",
    shows={"lead": (0,)},
    hidden=("lead=(1,)",),
    consequence="The largest logit of an empty batch is asked for.",
)
def gate_raises_without_tokens(hidden_states: Tensor, *call: Tensor) -> Tensor:
    hidden_states.max()
    return run(hidden_states, *call)
