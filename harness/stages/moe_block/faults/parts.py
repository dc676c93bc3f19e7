"""Faults of router, experts and shared expert's gate inside the block: one part wrong, the others right.

    block = experts(router(logits)) + shared_expert_gate(shared_expert)

`inside` puts a fault of a part in its place, so that a failing block is told what its part does, and its checks are
tried on that.  A fault is taken over where it changes values that can be reached through the arguments of a block;
`LEFT_OUT` says why the others are not.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from moe_harness.harness.core.catalogue import Fault, enter, known
from moe_harness.harness.stages.experts.faults import alignment, memory, precision, sentinels, slots, tiles
from moe_harness.harness.stages.moe_block.faults._steps import (
    RIGHT,
    Config,
    Routing,
    Steps,
    Weights,
    run,
    ungated,
)
from moe_harness.harness.stages.router.faults import groups, promises, selection
from moe_harness.harness.stages.router.faults import weights as router
from moe_harness.harness.stages.shared_expert_gate.faults import gates
from moe_harness.reference import moe_block as parts

HOMES = (router, groups, selection, promises, slots, tiles, alignment, memory, precision, sentinels, gates)

LEFT_OUT = {
    "the block has this fault of its own, under another name": (
        "always_renormalised", "bias_ignored", "groups_ignored", "scaling_ignored", "scaled_twice", "gate_dropped",
    ),
    "inside a block another fault is the same function of the data": (
        "normalised_twice",  # sigmoid_scaled_only_when_not_renormalised: one family alone scales and renormalises
        "ids_sorted_without_weights", "ids_held_in_eight_bits", "weights_cast_to_bf16",  # the router's do the same
    ),
    "a block's ids are distinct, its weights positive, nothing is masked and no expert lives elsewhere": (
        "negative_weights_dropped", "duplicate_slot_dropped", "duplicate_weight_overwritten", "workspace_not_cleared",
        "small_batches_keep_sentinels", "filtered_rows_shift_experts", "padding_rows_shift_the_others",
        "minus_one_wraps_to_last_expert", "minus_one_wraps_in_expert_map", "masked_slots_run_expert_zero",
        "expert_map_ignored", "expert_map_applied_twice", "local_ids_from_offset", "every_rank_owns_the_first_experts",
        "foreign_experts_run_as_zero", "masked_weight_multiplied_by_zero", "rows_without_local_expert_unwritten",
        "masked_slots_unwritten", "partly_masked_rows_skipped", "slots_after_a_mask_dropped",
        "live_weights_renormalised",
    ),
    "the logits, the routing and the shared expert's output are the block's own: contiguous, of ordinary size": (
        "logit_stride_assumed", "routing_strides_assumed", "shared_row_stride_assumed", "columns_beyond_h_ungated",
        "gates_of_first_batch_row", "softmax_without_maximum", "large_epsilon_in_sum", "other_groups_filled_with_zero",
    ),
    "a block's data have no such values: activations beyond 88, experts holding NaN, many rows, sums that cancel": (
        "silu_overflows", "sigmoid_overflows", "every_expert_on_every_token", "infinity_clamped", "gate_swallows_nan",
        "tail_beyond_32768_rows", "columns_beyond_4096_lost", "counts_in_sixteen_bits", "rows_beyond_32768_zero",
        "dot_product_split_in_16_bits",
    ),
    "every family of the reference has silu": (
        "activation_ignored", "gelu_erf_for_tanh", "native_path_for_one_token",
    ),
    "it ends the call: an id out of range is used as an index": ("nan_row_gives_id_e", "last_rows_unwritten"),
    "the permitted roundings of the routed experts are larger": ("bf16_dot_product",),
}  # fmt: skip


def inside(part: Fault) -> Callable[..., Tensor]:
    """A block whose router, experts or shared expert's gate is this fault."""

    def block(hidden_states: Tensor, weights: Weights, config: Config, *, steps: Steps = RIGHT) -> Tensor:
        wrong = part.function if steps.part is None else partial(part.function, steps=steps.part)

        def route(logits: Tensor, weights: Weights, config: Config) -> Routing:
            rule = parts.routing_rule(config).as_keywords()
            return wrong(logits, correction_bias=parts.correction_bias(weights, config), **rule)

        def routed(x: Tensor, weights: Weights, routing: Routing, config: Config) -> Tensor:
            stacked = weights["experts.gate_up_proj"], weights["experts.down_proj"]
            # The experts get the caller's tensor: its strides and dtype are what many of their faults are about.
            return wrong(hidden_states, *stacked, *routing, activation=parts.activation(config)).to(x.dtype)

        def gated(x: Tensor, weights: Weights, config: Config) -> Tensor:
            gate = weights.get("shared_expert_gate.weight")
            if gate is None:
                return steps.shared(x, weights, config)
            return wrong(hidden_states, gate, ungated(x, weights, config)).to(x.dtype)

        step: dict[str, Any] = {"router": {"route": route}, "experts": {"routed": routed}}
        return run(hidden_states, weights, config, steps=steps, **step.get(part.stage, {"shared": gated}))

    block.__name__, block.__module__ = name_of(part), __name__
    for attribute in ("dtypes", "devices", "rounds"):
        if hasattr(part.function, attribute):
            setattr(block, attribute, getattr(part.function, attribute))
    return block


def name_of(part: Fault) -> str:
    return f"{part.name}_in_block"


def _taken_over() -> list[Fault]:
    homes, left_out = {home.__name__ for home in HOMES}, {name for names in LEFT_OUT.values() for name in names}
    found = [fault for fault in known() if fault.function.__module__ in homes and fault.sign == "value"]
    return [fault for fault in found if fault.name not in left_out]


def __getattr__(name: str) -> Callable[..., Tensor]:
    """The blocks by the names of their faults, so that each is found by its spec."""
    if name in _BLOCKS:
        return _BLOCKS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_BLOCKS = {name_of(part): inside(part) for part in _taken_over()}
for _part in _taken_over():
    enter(
        replace(
            _part, name=name_of(_part), stage="moe_block", function=_BLOCKS[name_of(_part)], part=_part, hidden=(),
            shows=None, consequence=f"Inside the block, its {_part.stage}: {_part.consequence}",
        )
    )  # fmt: skip
