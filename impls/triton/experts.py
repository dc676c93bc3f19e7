r"""The routed experts as fused Triton kernels.

    [g; u] = gate_up_proj[e] @ x[t]        a = act(g) * u        out[t] = sum over j of w[t, j] * (down_proj[e] @ a)

Few tokens: three launches (`_few_tokens`).  Otherwise four or five: alignment of slots to experts, gate_up with gather
and activation, down with scatter back to slots, weighted sum per token.  The sum runs over slots in order, so results
are bitwise the same in every run; nothing waits for the device, so the call can be captured in a CUDA graph.

Rounded to the input dtype on the way: `activation` (act(g) * u) and `expert_output` (down @ a); weights enter in fp32.
Strides of every operand are honoured; `expert_map` is copied where it is not contiguous.  Weights whose layout the copy
engine accepts (last dimension contiguous, 16-byte aligned) are read through it, others through pointers.
"""

import torch
from torch import Tensor

from moe_harness.impls.launching import Repeated
from moe_harness.impls.triton import configs
from moe_harness.impls.triton._combine import combine
from moe_harness.impls.triton._common import require
from moe_harness.impls.triton._few_tokens import few_tokens
from moe_harness.impls.triton._linear import linear
from moe_harness.impls.triton.alignment import align
from moe_harness.impls.triton.gate_up import gate_up

__all__ = ["experts"]  # what is registered; run_entry serves the tuner and its suite


def _check(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, activation: str) -> None:
    """Refuse shapes that do not fit together."""
    require(x, up, down)
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}, but should be 'silu' or 'gelu_tanh'")
    num_experts, hidden, width = down.shape
    if x.shape[1] != hidden or tuple(up.shape) != (num_experts, 2 * width, hidden):
        raise ValueError(
            f"shapes are hidden_states {tuple(x.shape)}, gate_up_proj {tuple(up.shape)}, "
            f"down_proj {tuple(down.shape)}, but should be [T, H], [E, 2 * I, H], [E, H, I]"
        )
    if weights.shape != ids.shape or ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk shapes are {tuple(weights.shape)} and {tuple(ids.shape)}, but should be [T, k] both")


def run_entry(
    entry: configs.Entry, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor,
    activation: str, expert_map: Tensor | None, expected: int,
) -> Tensor:  # fmt: skip
    """[T, H] computed as `entry` says; arguments as in `experts`, with at least one slot.

    Grids are sized for `expected` slots with a local expert; more are handled.
    """
    y = _by_slot(entry, x, up, down, ids, activation, expert_map, expected)
    return combine(y, weights, ids, up.shape[0], expert_map)


def _by_slot(
    entry: configs.Entry, x: Tensor, up: Tensor, down: Tensor, ids: Tensor, activation: str, expert_map: Tensor | None,
    expected: int,
) -> Tensor:  # fmt: skip
    """[T * k, H], each slot's expert without its weight; rows of masked slots are undefined."""
    if entry.walk is not None:
        return few_tokens(x, up, down, ids, activation, expert_map, entry.walk)
    first, second = entry.products()
    counts, slots = align(ids, up.shape[0], expert_map)
    act = gate_up(x, up, counts, slots, ids.shape[1], activation, first, expected)
    return linear(act, down, counts, second, expected, slots=slots)


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts.

    Args:
        hidden_states: [T, H], fp32, fp16 or bf16, as are both weights.
        gate_up_proj: [E_local, 2 * I, H], gate rows first.
        down_proj: [E_local, H, I].
        topk_weights: [T, k], any floating dtype.
        topk_ids: [T, k], int32 or int64: local ids, or global ones where `expert_map` gives the local id or -1.
            Ids outside [0, E_local) contribute nothing.

    Returns:
        New [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: shapes that do not fit together, unknown activation.
        TypeError: other dtypes, or weights in another dtype than hidden_states.
        NotImplementedError: tensors on the CPU without TRITON_INTERPRET=1.
    """
    if expert_map is not None:
        expert_map = expert_map.contiguous()
    tensors = (hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, expert_map)
    return _experts(tensors, activation)


@Repeated
def _experts(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    expert_map: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """`experts` with every argument by position."""
    _check(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation)
    if topk_ids.numel() == 0 or gate_up_proj.numel() == 0:
        return torch.zeros(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    num_experts, hidden, width = down_proj.shape
    shape = configs.Shape(num_experts, hidden, width, topk_ids.shape[1], hidden_states.element_size())
    slots = _expected(topk_ids, num_experts, expert_map)
    entry = configs.choose(shape, slots, hidden_states.device)
    return run_entry(
        entry, hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, activation, expert_map, slots
    )


def experts_by_slot(
    x: Tensor, up: Tensor, down: Tensor, ids: Tensor, *, activation: str, expert_map: Tensor | None = None
) -> Tensor:
    """What `experts` sums, with a row for each slot: [T * k, H], undefined where the id is masked.

    Raises:
        as `experts`; ValueError where there is no slot or no expert.
    """
    _check(x, up, down, ids, ids, activation)
    if not ids.numel() or not up.numel():
        raise ValueError(f"topk_ids are {tuple(ids.shape)} of {up.shape[0]} experts, but should hold a slot")
    num_experts, hidden, width = down.shape
    shape = configs.Shape(num_experts, hidden, width, ids.shape[1], x.element_size())
    slots = _expected(ids, num_experts, expert_map)
    entry = configs.choose(shape, slots, x.device)
    return _by_slot(entry, x, up, down, ids, activation, expert_map, slots)


def _expected(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> int:
    """Slots with a local expert: on one rank of many only a share of all; more are handled, only slower."""
    spread = num_experts if expert_map is None else max(num_experts, expert_map.numel())
    return max(1, ids.numel() * num_experts // spread)


experts.deterministic = True
experts.graph_capturable = True
experts.rounds = ("activation", "expert_output")
