"""Faults of the step that sorts rows to experts and pads each expert's run to whole blocks (stage experts).

    sorted_rows   slots of the batch (token * k + slot) by expert, each run padded to a multiple of the block with T * k
    block_experts the expert of each block; -1 for the blocks beyond `padded`
    padded        how many entries of sorted_rows are in use

`run_aligned` computes block by block, as fused kernels do, from whatever such a plan says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import BLOCK, round_up, unwritten, unwritten_like, wide
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, halves, locate


class Plan(NamedTuple):
    """Which rows each block works on; see the module's docstring."""

    sorted_rows: Tensor
    block_experts: Tensor
    padded: int


def count(ids: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, [E]."""
    return torch.bincount(ids[ids >= 0], minlength=num_experts)


def fill(ids: Tensor, counts: Tensor, starts: Tensor, sorted_rows: Tensor) -> Tensor:
    """Write each expert's first counts[e] rows from starts[e] on; what does not fit is dropped."""
    for expert in range(len(counts)):
        rows = (ids == expert).nonzero().flatten()[: max(int(counts[expert]), 0)]
        room = sorted_rows[int(starts[expert]) :][: len(rows)]
        room.copy_(rows[: len(room)])
    return sorted_rows


def align(ids: Tensor, num_experts: int, *, counts: Tensor | None = None, filler: int | None = None) -> Plan:
    """A right plan; `counts` and `filler` (what padding holds) are where faults enter."""
    counts = count(ids, num_experts) if counts is None else counts
    runs = (counts.clamp(min=0) + BLOCK - 1) // BLOCK * BLOCK
    ends = runs.cumsum(0)
    size = round_up(len(ids) + num_experts * (BLOCK - 1))
    sorted_rows = torch.full((size,), len(ids) if filler is None else filler, device=ids.device)
    fill(ids, counts, ends - runs, sorted_rows)
    first_rows = torch.arange(0, size, BLOCK, device=ids.device)
    experts = torch.searchsorted(ends, first_rows, right=True)
    padded = int(ends[-1]) if num_experts else 0
    return Plan(sorted_rows, torch.where(first_rows < padded, experts, -1), padded)


def run_aligned(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    expert_map: Tensor | None = None,
    steps: Steps = RIGHT,
    align: Callable[[Tensor, int], Plan] = align,
    locate: Callable[[Tensor, Tensor | None], Tensor] = locate,
) -> Tensor:
    """A right implementation over blocks; `align` and `locate` are where faults enter."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}")
    ids = locate(topk_ids, expert_map)
    plan = align(ids.flatten(), gate_up_proj.shape[0])
    slots = hidden_states.new_zeros(ids.numel(), down_proj.shape[1], dtype=wide(hidden_states))
    blocks = plan.sorted_rows[: plan.padded].view(-1, BLOCK)
    experts = plan.block_experts[: len(blocks)]
    for expert in experts[experts >= 0].unique().tolist():
        # Blocks of one expert are computed together: the same arithmetic as one by one, in fewer steps.
        rows = blocks[experts == expert].flatten()
        rows = rows[(rows >= 0) & (rows < ids.numel())]
        tokens = rows // max(ids.shape[1], 1)
        hidden = steps.gated(*halves(steps.matmul(hidden_states[tokens], gate_up_proj[expert])), activation)
        slots[rows] = steps.matmul(hidden, down_proj[expert])
    return steps.combine(slots.view(*ids.shape, slots.shape[1]), topk_weights, ids).to(hidden_states.dtype)


@fault(
    "alignment", source="ModelTC/LightLLM/pull/1369", condition="E not a multiple of 4, E > 4", shows={"E": 6, "T": 9},
    hidden=("E=8", "E=3"),
)  # fmt: skip
def counts_wrap_modulo_experts(*call: Tensor, **options: Any) -> Tensor:
    """Expert offsets wrap modulo E: the tail program overwrites the counts of the first experts."""

    def wrapped(ids: Tensor, num_experts: int) -> Plan:
        counts = count(ids, num_experts)
        if num_experts > 4:
            counts[: -num_experts % 4] = 0
        return align(ids, num_experts, counts=counts)

    return run_aligned(*call, **options, align=wrapped)


@fault(
    "alignment", source="NVIDIA/TileGym/pull/24", condition="E not a power of two", shows={"E": 6, "T": 9},
    hidden=("E=8",),
)  # fmt: skip
def experts_beyond_power_of_two_dropped(*call: Tensor, **options: Any) -> Tensor:
    """Experts beyond the last power of two are not counted."""

    def floored(ids: Tensor, num_experts: int) -> Plan:
        counts = count(ids, num_experts)
        counts[2 ** (num_experts.bit_length() - 1) :] = 0
        return align(ids, num_experts, counts=counts)

    return run_aligned(*call, **options, align=floored)


@fault("alignment", source="sgl-project/sglang/issues/3339", condition="dirty memory", shows={"variant": "poisoned"})
def counts_in_uninitialised_memory(*call: Tensor, **options: Any) -> Tensor:
    """Counts are accumulated into uninitialised memory: rows land anywhere or out of bounds."""

    def dirty(ids: Tensor, num_experts: int) -> Plan:
        counts = unwritten(num_experts, dtype=torch.int32, device=ids.device).long() + count(ids, num_experts)
        # Beyond the buffer a kernel would crash; here such rows are dropped.
        return align(ids, num_experts, counts=torch.where((counts < 0) | (counts > len(ids)), 0, counts))

    return run_aligned(*call, **options, align=dirty)


@fault(
    "alignment", source="ROCm/aiter/pull/5339", condition="any padding; slot 0 of the batch", shows={"T": 9},
    hidden=("E=1,k=1",),
)  # fmt: skip
def padding_is_row_zero(*call: Tensor, **options: Any) -> Tensor:
    """Padding holds 0, a valid row: every expert writes its output into the first slot."""
    return run_aligned(*call, **options, align=lambda ids, num_experts: align(ids, num_experts, filler=0))


@fault(
    "alignment", source="vllm-project/vllm/pull/35161",
    condition="unused blocks at the end of the plan; slot 0 not routed to expert 0", shows={"routing": "last"},
    hidden=("E=1,k=1,routing=uniform",),
)  # fmt: skip
def unused_blocks_belong_to_expert_zero(*call: Tensor, **options: Any) -> Tensor:
    """Blocks beyond the used ones belong to expert 0 and overwrite the first slot."""

    def unbounded(ids: Tensor, num_experts: int) -> Plan:
        plan = align(ids, num_experts)
        unused = torch.arange(len(plan.sorted_rows), device=ids.device) >= plan.padded
        experts = plan.block_experts.clamp(min=0)
        busiest = bool(unused.any()) and len(ids) > 0 and int(ids[0]) != 0
        rows = torch.where(unused, 0, plan.sorted_rows)
        if busiest:  # the unused blocks run last, so theirs is the value that stays
            rows[: plan.padded][rows[: plan.padded] == 0] = len(ids)
        return Plan(rows, experts, len(rows))

    return run_aligned(*call, **options, align=unbounded)


@fault(
    "alignment", source="sgl-project/sglang/pull/12701", condition="-1 ids and at most 64 rows",
    shows={"masked": "some", "T": 9}, hidden=("masked=none", "T=65"),
)  # fmt: skip
def small_batches_keep_sentinels(*call: Tensor, **options: Any) -> Tensor:
    """The small-batch path counts -1 as expert 0, the large-batch path skips it."""

    def small(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        return ids.clamp(min=0) if ids.numel() <= 64 else ids

    return run_aligned(*call, **options, locate=small)


@fault(
    "alignment", source="sgl-project/sglang/pull/32395", condition="some -1 ids, E > 1",
    shows={"masked": "some", "T": 9}, hidden=("masked=none",),
)  # fmt: skip
def filtered_rows_shift_experts(*call: Tensor, **options: Any) -> Tensor:
    """Bucket 0 of the filtered rows is not skipped: every expert id is off by one."""

    def shifted(ids: Tensor, num_experts: int) -> Plan:
        plan = align(ids, num_experts)
        if not (ids < 0).any():
            return plan
        used = plan.block_experts >= 0
        return plan._replace(block_experts=torch.where(used, (plan.block_experts + 1) % num_experts, -1))

    return run_aligned(*call, **options, align=shifted)


@fault(
    "alignment", source="vllm-project/vllm-xpu-kernels/issues/453", condition="an expert with more than one row",
    shows={"T": 9}, hidden=("T=1",),
)  # fmt: skip
def only_first_row_of_each_expert(*call: Tensor, **options: Any) -> Tensor:
    """Only the first row of each expert is written to the plan."""

    def first_only(ids: Tensor, num_experts: int) -> Plan:
        return align(ids, num_experts, counts=count(ids, num_experts).clamp(max=1))

    return run_aligned(*call, **options, align=first_only)


@fault(
    "alignment", source="deepseek-ai/DeepGEMM/issues/15", condition="an expert's rows not a multiple of 16",
    shows={"T": 9}, hidden=("E=1,k=1",),
)  # fmt: skip
def block_takes_expert_of_first_row(*call: Tensor, **options: Any) -> Tensor:
    """Runs are not padded and a block takes the expert of its first row."""

    def unpadded(ids: Tensor, num_experts: int) -> Plan:
        order = ids.argsort(stable=True)
        order = order[ids[order] >= 0]
        rows = torch.full((round_up(len(order)),), len(ids), device=ids.device)
        rows[: len(order)] = order
        return Plan(rows, ids[rows[::BLOCK].clamp(max=max(len(ids) - 1, 0))], len(rows))

    return run_aligned(*call, **options, align=unpadded)


@fault(
    "alignment", source="vllm-project/vllm/pull/51632", condition="rows of the last expert, without expert_map",
    shows={"T": 9}, hidden=("map=rank2",),
)  # fmt: skip
def last_expert_taken_for_invalid(*call: Tensor, **options: Any) -> Tensor:
    """The plan is sized for one expert less: the appended shared expert counts as invalid."""

    def fewer(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        return ids.masked_fill(ids == call[1].shape[0] - 1, -1) if expert_map is None else ids

    return run_aligned(*call, **options, locate=fewer)


@fault("alignment", condition="an expert with more than 16 rows", shows={"T": 40, "k": 3}, hidden=("T=1",))
def second_partial_block_lost(*call: Tensor, **options: Any) -> Tensor:
    """The padded length is rounded down per expert: a second, partial block is lost."""

    def floored(ids: Tensor, num_experts: int) -> Plan:
        counts = count(ids, num_experts)
        whole = counts // BLOCK * BLOCK
        return align(ids, num_experts, counts=torch.where(whole > 0, whole, counts))

    return run_aligned(*call, **options, align=floored)


@fault(
    "alignment", source="vllm-project/vllm/pull/44167", condition="E >= 256 and T <= 16, dirty memory",
    shows={"E": 256, "I": 8, "variant": "poisoned"}, hidden=("E=255", "T=17"),
)  # fmt: skip
def unchecked_launch_failure(hidden_states: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The small-batch kernel fails to launch, nobody looks, and the output is never written."""
    if gate_up.shape[0] >= 256 and hidden_states.shape[0] <= 16:
        return unwritten_like(hidden_states)
    return run_aligned(hidden_states, gate_up, *call, **options)


@fault(
    "alignment", condition="one expert with more than 32767 rows",
    shows={"T": 33_000, "H": 4, "I": 8, "E": 2, "k": 1, "routing": "one"}, hidden=("T=4",),
)  # fmt: skip
def counts_in_sixteen_bits(*call: Tensor, **options: Any) -> Tensor:
    """Counts are held in 16 bits and turn negative: the busiest expert is skipped."""

    def narrow(ids: Tensor, num_experts: int) -> Plan:
        return align(ids, num_experts, counts=count(ids, num_experts).to(torch.int16).long())

    return run_aligned(*call, **options, align=narrow)


@fault(
    "alignment", source="ROCm/aiter/pull/2447", condition="several experts with partial blocks", shows={"T": 9},
    hidden=("E=1,k=1",),
)  # fmt: skip
def plan_without_room_for_padding(*call: Tensor, **options: Any) -> Tensor:
    """The plan is sized for T * k rows without the padding: the last experts have no room."""

    def short(ids: Tensor, num_experts: int) -> Plan:
        plan = align(ids, num_experts)
        room = round_up(len(ids))
        return plan._replace(sorted_rows=plan.sorted_rows[:room], padded=min(plan.padded, room))

    return run_aligned(*call, **options, align=short)
