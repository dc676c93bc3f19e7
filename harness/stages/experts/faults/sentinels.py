"""Faults of the experts stage with -1 ids, expert maps and rows that no local expert works on."""

from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.catalogue import fault
from moe_harness.harness.core.emulation import unwritten, unwritten_like, wide
from moe_harness.harness.stages.experts.faults._steps import RIGHT, Steps, live, locate, run


@fault(
    "sentinels", source="ROCm/aiter/issues/4636", condition="an id of -1 without expert_map", shows={"masked": "some"},
    hidden=("masked=none", "map=rank2"),
)  # fmt: skip
def minus_one_wraps_to_last_expert(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """-1 is used as an index and wraps to the last expert."""

    def wrapped(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return ids.long() % gate_up.shape[0] if expert_map is None else locate(ids, expert_map)

    return run(hidden, gate_up, *call, **options, locate=wrapped)


@fault(
    "sentinels", source="vllm-project/vllm/pull/46408", condition="an id of -1 and expert_map",
    shows={"masked": "some", "map": "rank2"}, hidden=("masked=none", "map=none"),
)  # fmt: skip
def minus_one_wraps_in_expert_map(*call: Tensor, **options: Any) -> Tensor:
    """expert_map[-1] is its last entry: masked slots run a real expert."""

    def wrapped(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return ids.long() if expert_map is None else expert_map.long()[ids.long()]

    return run(*call, **options, locate=wrapped)


@fault(
    "sentinels", source="sgl-project/sglang/pull/36404", condition="an id of -1", shows={"masked": "some"},
    hidden=("masked=none",),
)  # fmt: skip
def masked_slots_run_expert_zero(*call: Tensor, **options: Any) -> Tensor:
    """Padding is filled with 0, which is a valid id: masked slots run expert 0."""
    return run(*call, **options, locate=lambda ids, expert_map: locate(ids.clamp(min=0), expert_map))


@fault(
    "sentinels", source="tile-ai/TileOPs/pull/640", condition="expert_map given", shows={"map": "rank2"},
    hidden=("map=none",),
)  # fmt: skip
def expert_map_ignored(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """expert_map is accepted and never used: global ids are taken for local ones."""

    def unmapped(ids: Tensor, _: Tensor | None) -> Tensor:
        # Ids beyond the local weights would be read out of bounds; they wrap instead.
        return torch.where(ids < 0, -1, ids.long() % gate_up.shape[0])

    return run(hidden, gate_up, *call, **options, locate=unmapped)


@fault(
    "sentinels", source="sgl-project/sglang/pull/20516", condition="expert_map that is not the identity on local ids",
    shows={"map": "rank2"}, hidden=("map=none", "map=rank1"),
)  # fmt: skip
def expert_map_applied_twice(*call: Tensor, **options: Any) -> Tensor:
    """The map over global ids is applied to local ones a second time."""
    return run(*call, **options, locate=lambda ids, expert_map: locate(locate(ids, expert_map), expert_map))


@fault(
    "sentinels", source="NVIDIA/TensorRT-LLM/pull/13888", condition="expert_map that is not one ascending run",
    shows={"map": "alternate"}, hidden=("map=rank2", "map=none"),
)  # fmt: skip
def local_ids_from_offset(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """The local id is computed from the first owned expert instead of read from the map."""

    def offset(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        if expert_map is None or not (expert_map >= 0).any():
            return locate(ids, expert_map)
        local = ids.long() - int((expert_map >= 0).nonzero()[0])
        return torch.where((ids < 0) | (local < 0) | (local >= gate_up.shape[0]), -1, local)

    return run(hidden, gate_up, *call, **options, locate=offset)


@fault(
    "sentinels", source="THUDM/slime/pull/1799", condition="expert_map of a rank above 0",
    shows={"map": "rank2"}, hidden=("map=none", "map=rank1"),
)  # fmt: skip
def every_rank_owns_the_first_experts(hidden: Tensor, gate_up: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Every rank believes to own the first experts: global ids below E_local are run as they are."""

    def first_rank(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return locate(ids, None) if expert_map is None else torch.where(ids < gate_up.shape[0], ids.long(), -1)

    return run(hidden, gate_up, *call, **options, locate=first_rank)


@fault(
    "sentinels", condition="an expert that lives elsewhere", shows={"map": "rank2"},
    hidden=("map=none", "map=rank1"),
)  # fmt: skip
def foreign_experts_run_as_zero(*call: Tensor, **options: Any) -> Tensor:
    """-1 in the map is clamped: experts of other ranks run as local expert 0."""

    def clamped(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return torch.where(ids < 0, -1, locate(ids, expert_map).clamp(min=0))

    return run(*call, **options, locate=clamped)


@fault(
    "sentinels", condition="NaN or infinite weight on a masked slot", shows={"masked": "some"},
    hidden=("masked=none",),
)  # fmt: skip
def masked_weight_multiplied_by_zero(*call: Tensor, **options: Any) -> Tensor:
    """Masked slots are multiplied by 0 instead of replaced: 0 * NaN is NaN."""

    def multiplied(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        return ((topk_weights * (ids >= 0)).to(slots.dtype)[..., None] * slots).sum(1)

    return run(*call, **options, combine=multiplied)


@fault("sentinels", condition="a slot of local expert 0", hidden=("routing=last",))
def expert_zero_is_the_sentinel(*call: Tensor, **options: Any) -> Tensor:
    """Slots count where the id is above 0: expert 0 is treated as the sentinel."""

    def positive(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        ids = locate(ids, expert_map)
        return ids.masked_fill(ids == 0, -1)

    return run(*call, **options, locate=positive)


@fault(
    "sentinels", source="vllm-project/vllm-ascend/pull/9992",
    condition="a token without any local expert, dirty memory", shows={"masked": "rows", "variant": "poisoned"},
    hidden=("masked=none",),
)  # fmt: skip
def rows_without_local_expert_unwritten(*call: Tensor, **options: Any) -> Tensor:
    """The output comes from torch.empty and rows without a local expert are never written."""
    right = run(*call, **options)
    busy = (locate(call[4], options.get("expert_map")) >= 0).any(1, keepdim=True)
    return torch.where(busy, right, unwritten_like(right))


@fault(
    "sentinels", source="PrimeIntellect-ai/prime-rl/pull/2035", condition="a masked slot, dirty memory",
    shows={"masked": "some", "variant": "poisoned"}, hidden=("masked=none",),
)  # fmt: skip
def masked_slots_unwritten(hidden: Tensor, gate_up: Tensor, down: Tensor, *call: Tensor, **options: Any) -> Tensor:
    """Slots of other ranks stay uninitialised and are summed with weight 0: garbage or NaN."""
    slots = unwritten(*call[1].shape, down.shape[1], dtype=wide(hidden), device=hidden.device)
    return run(hidden, gate_up, down, *call, **options, slots=slots)


@fault(
    "sentinels", condition="a masked slot in a row with others", shows={"masked": "some"},
    hidden=("masked=none", "masked=rows"),
)  # fmt: skip
def partly_masked_rows_skipped(*call: Tensor, **options: Any) -> Tensor:
    """A row with any -1 is taken for padding and skipped altogether."""

    def whole_rows(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        masked = (ids < 0).any(1, keepdim=True)
        return locate(ids, expert_map).masked_fill(masked, -1)

    return run(*call, **options, locate=whole_rows)


@fault("sentinels", condition="a masked slot before a live one", shows={"masked": "one"}, hidden=("masked=none",))
def slots_after_a_mask_dropped(*call: Tensor, **options: Any) -> Tensor:
    """The loop over slots stops at the first -1, believing that padding is at the end."""

    def until_mask(ids: Tensor, expert_map: Tensor | None) -> Tensor:
        return locate(ids, expert_map).masked_fill((ids < 0).cumsum(1) > 0, -1)

    return run(*call, **options, locate=until_mask)


@fault("sentinels", condition="a masked slot", shows={"masked": "some"}, hidden=("masked=none",))
def live_weights_renormalised(*call: Tensor, steps: Steps = RIGHT, **options: Any) -> Tensor:
    """The weights of masked slots are handed to the live ones by normalising over the live."""

    def renormalised(slots: Tensor, topk_weights: Tensor, ids: Tensor) -> Tensor:
        before = topk_weights.to(slots.dtype).nan_to_num(0.0).sum(1, keepdim=True)
        weights = live(topk_weights, ids, slots.dtype)
        # With nothing masked the factor is 1 to the bit.
        return steps.combine(slots, weights * before / weights.sum(1, keepdim=True), ids).nan_to_num(0.0)

    return run(*call, **options, steps=steps, combine=renormalised)
