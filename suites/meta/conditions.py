"""How often the condition found for a fault equals the declared one; python -m moe_harness.suites.meta.conditions

Each fault of `DECLARED` is judged like any implementation.  The conditions of its clusters, any of which may hold, are
then compared with the declared one, written as a predicate over cases, on the cases of another plan (full profile,
another seed) that the run has not seen: equal where at most `APART` of them are told differently.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from moe_harness.harness import checks
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.contracts import load
from moe_harness.harness.core.invocation import Broken, Rejected, Trial
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.diagnosis.candidates import restored
from moe_harness.harness.diagnosis.clusters import Cluster, Outcome, cluster, kind_of
from moe_harness.harness.run.data_power import prove

APART = 0.02
PROMISED = 0.9  # of the declared conditions are found
MOST_ROWS = 600  # of a case; what is larger takes most of the time and adds little
CHECKS = {"router": ("contract", "routing", "layouts"), "experts": ("contract", "exact", "numeric", "layouts"),
          "grouped_linear": ("contract", "numeric"), "shared_expert_gate": ("contract", "numeric"),
          "rms_norm": ("contract", "exact", "numeric"), "rope_cache": ("contract", "exact", "numeric"),
          "paged_attention": ("contract", "numeric")}  # fmt: skip
Declared = Callable[[Any], bool]


def sums_to_one(case: Any) -> bool:
    """Whether renormalisation changes nothing: a softmax of which every expert is chosen."""
    return case.scoring == "softmax" and case.k == case.E


# What the catalogue says in words; only what the axes of a plan can say is here.
DECLARED: dict[str, Declared] = {
    "softmax_after_topk": lambda c: c.scoring == "softmax" and not c.renorm and c.k < c.E,
    "always_renormalised": lambda c: not c.renorm and not sums_to_one(c),
    "never_renormalised": lambda c: c.renorm and not sums_to_one(c),
    "sigmoid_never_renormalised": lambda c: c.scoring == "sigmoid" and c.renorm,
    "scoring_ignored": lambda c: c.scoring == "sigmoid",
    "scaling_ignored": lambda c: c.scale != 1,
    "scaled_twice": lambda c: c.scale != 1,
    "scaled_only_when_renormalised": lambda c: c.scale != 1 and not c.renorm,
    "raises_on_empty_logits": lambda c: c.T == 0,
    "slot_dimension_squeezed": lambda c: c.k == 1,
    "only_eight_candidates": lambda c: c.k > 8,
    "experts_beyond_256_never_chosen": lambda c: c.E > 256,
    "ids_returned_in_eight_bits": lambda c: c.E > 256,
    "broken_router_at_128_8": lambda c: (c.E, c.k) == (128, 8),
    "ids_as_floats": lambda c: True,
    "ids_before_weights": lambda c: True,
    "gate_up_swapped": lambda c: True,
    "activation_dropped": lambda c: True,
    "up_plus_one": lambda c: True,
    "gate_up_interleaved": lambda c: c.I > 1,
    "fused_gate_up_chunked_across_shards": lambda c: c.I % 2 == 0,
    "one_shard_of_i_not_reduced": lambda c: c.I > 1,
    "down_transposed_if_square": lambda c: c.I == c.H,
    "gate_up_transposed_if_square": lambda c: 2 * c.I == c.H,
    "fallback_reads_shuffled_weights": lambda c: c.I % 64 != 0,
    "activation_ignored": lambda c: c.activation == "gelu_tanh",
    "gelu_for_silu": lambda c: c.activation == "silu",
    "alpha_of_another_model": lambda c: c.activation == "silu",
    "weight_applied_twice": lambda c: True,
    "flat_weights": lambda c: c.k > 1,
    "weight_of_first_slot": lambda c: c.k > 1,
    "last_slot_dropped": lambda c: c.k > 1,
    "one_expert_per_token": lambda c: c.k > 1,
    "slots_beyond_eight_dropped": lambda c: c.k > 8,
    "duplicate_slot_dropped": lambda c: c.routing == "duplicates" and c.k > 1,
    "duplicate_weight_overwritten": lambda c: c.routing == "duplicates" and c.k > 1,
    "single_slot_unweighted": lambda c: c.k == 1,
    "experts_beyond_power_of_two_dropped": lambda c: bool(c.E & (c.E - 1)),
    "only_first_row_of_each_expert": lambda c: c.T > 1,
    "mean_forgotten": lambda c: c.H > 1,
    "weight_dropped": lambda c: True,
    "one_added_to_the_weight": lambda c: True,
    "residual_not_normalised": lambda c: c.residual,
    "old_residual_returned": lambda c: c.residual,
    "normalised_rows_returned_as_sum": lambda c: c.residual,
    "residual_added_behind_the_norm": lambda c: c.residual,
    "residual_added_twice": lambda c: c.residual,
    "root_of_the_first_row": lambda c: c.rows() > 1,
    "tail_of_the_sum_dropped": lambda c: c.H % 16 != 0 and c.H > 16,
    "columns_beyond_one_block_not_scaled": lambda c: c.H > 1024,
    "mean_over_the_padded_width": lambda c: bool(c.H & (c.H - 1)),
    "neighbours_turned": lambda c: c.D > 2 and c.positions != "zero",
    "turned_the_other_way": lambda c: c.positions != "zero",
    "theta_ignored": lambda c: c.theta != 1e4 and c.positions != "zero" and c.D > 2,
    "position_one_ahead": lambda c: True,
    "half_of_each_head_turned": lambda c: c.D > 2 and c.positions != "zero",
    "keys_kept_as_values": lambda c: c.slots != "none",
    "values_not_written": lambda c: c.slots != "none",
    "caches_exchanged": lambda c: c.slots != "none",
    "minus_one_wraps": lambda c: c.slots == "none" or c.slots == "some" and c.T > 1,
    "minus_one_is_slot_0": lambda c: c.slots == "none" or c.slots == "some" and c.T > 1,
    "slots_of_pages_of_16": lambda c: c.page != 16 and c.slots != "none",
    "weight_of_queries_for_keys": lambda c: c.norms == "both" and c.slots != "none",
    "norms_left_out": lambda c: c.norms in ("both", "q") or c.norms == "k" and c.slots != "none",
    "first_key_head_written_alone": lambda c: c.Hk > 1 and c.slots != "none",
    "heads_dealt_in_turn": lambda c: 1 < c.Hk < c.Hq,
    "first_key_head_for_all": lambda c: c.Hk > 1,
    "table_of_the_first_sequence": lambda c: c.S > 1,
    "keys_for_values": lambda c: True,
    "page_size_assumed": lambda c: c.page != 16 and c.length > min(c.page, 16),
    "nan_without_keys": lambda c: c.empties and c.S > 2,
    "scale_left_out": lambda c: c.scale != 1 and c.length > 1,
    "window_of_128": lambda c: c.length > 128,
    "base_two_without_log2e": lambda c: c.length > 1,
    "weights_not_normalised": lambda c: c.length > 1,
    "cache_strides_assumed": lambda c: c.order == "head" and c.Hk > 1 and c.page > 1,
    "residual_normalised_alone": lambda c: c.residual,
    "x_returned_as_sum": lambda c: c.residual,
    "root_of_the_row_before": lambda c: c.rows() > 1,
    "mean_over_the_batch": lambda c: c.rows() > 1,
    "columns_beyond_one_block_not_counted": lambda c: c.H > 1024,
    "first_weight_for_all": lambda c: c.H > 1,
    "weight_one_column_off": lambda c: c.H > 1,
    "keys_not_turned": lambda c: c.positions != "zero" and c.slots != "none",
    "queries_not_turned": lambda c: c.positions != "zero",
    "keys_turned_twice": lambda c: c.positions != "zero" and c.slots != "none",
    "both_halves_added": lambda c: c.positions != "zero",
    "sine_and_cosine_exchanged": lambda c: True,
    "row_for_position": lambda c: c.positions in ("random", "far") or c.positions == "zero" and c.T > 1,
    "position_one_behind": lambda c: c.positions != "zero",
    "rows_added_to_the_cache": lambda c: c.slots != "none",
    "slots_one_ahead": lambda c: c.slots != "none",
    "first_row_written_alone": lambda c: c.T > 1 and c.slots != "none",
    "values_normalised": lambda c: c.norms in ("both", "k") and c.slots != "none",
    "table_of_the_sequence_before": lambda c: c.S > 1,
    "scaled_twice_in_attention": lambda c: c.scale != 1 and c.length > 1,
    "log2e_and_exp": lambda c: c.length > 1,
    "one_added_to_the_sum": lambda c: True,
    "linear_bias_ignored": lambda c: c.bias,
    "groups_beyond_256_dropped": lambda c: c.E > 256,
    "gate_inverted": lambda c: True,
    "gate_dropped": lambda c: True,
    "width_tail_of_scores_dropped": lambda c: c.D % 16 != 0 and c.D > 16 and c.length > 1,
}


def measure(names: Iterable[str], seed: int) -> list[dict[str, Any]]:
    """For each fault: the declared condition in words, those found, and the share of unseen cases told differently."""
    torch.set_num_threads(1)
    faults: dict[str, list[Fault]] = {}
    for fault in all_faults():
        if fault.name in set(names):
            faults.setdefault(fault.stage, []).append(fault)
    told = []
    for stage, of_stage in faults.items():
        outcomes = judged(stage, of_stage, seed)
        plans = [p for p in plan(stage, Request(profile="full", seed=seed + 1)) if p.check in CHECKS[stage]]
        told += [compared(fault, cluster(outcomes[fault.name]), [p.case for p in plans]) for fault in of_stage]
    return told


def compared(fault: Fault, clusters: list[Cluster], cases: Iterable[Case]) -> dict[str, Any]:
    """The declared condition beside those found."""
    unseen = [case for case in cases if fault.name == "raises_on_empty_logits" or case.shows()]
    apart = sum(_found(clusters, case) != bool(DECLARED[fault.name](case)) for case in unseen) / len(unseen)
    told = {"fault": fault.name, "stage": fault.stage, "declared": fault.condition, "apart": round(apart, 4),
            "found": [str(each.condition) for each in clusters], "equal": apart <= APART}  # fmt: skip
    print(json.dumps(told), flush=True)
    return told


def judged(stage: str, faults: Iterable[Fault], seed: int) -> dict[str, list[Outcome]]:
    """What a run sees of each fault; all get one call of each case, whose data and bound cost most of the time."""
    trials = {fault.name: Trial(load(stage, fault.spec), "cpu") for fault in faults}
    first = next(iter(trials.values()))
    found: dict[str, list[Outcome]] = {name: [] for name in trials}
    for planned in plan(stage, Request(seed=seed)):
        if planned.check not in CHECKS[stage] or planned.case.rows() > MOST_ROWS:
            continue
        case = prove(first, planned.case).case
        if case is None:
            continue
        call = first.build(case)
        for name, trial in trials.items():
            trial.hand_out(call)
            try:
                with restored(trial.stage, call):  # what one writes in place the next would find there
                    findings = [finding.message for finding in checks.CHECKS[planned.check](trial, case).findings]
            except Rejected:
                continue
            except Broken as error:
                findings = [str(error)]
            kind = kind_of(findings[0]) if findings else None
            found[name].append(Outcome(planned.check, case, planned.id, kind))
    return found


def _found(clusters: Iterable[Cluster], case: Case) -> bool:
    return any(each.condition is not None and each.condition.holds(case) for each in clusters)


def main() -> None:
    """Measure and write docs/conditions.json; exit status 1 where fewer conditions are found than is promised."""
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", nargs="*", default=list(DECLARED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    told = measure(asked.faults, asked.seed)
    equal = sum(entry["equal"] for entry in told)
    print(f"{equal} of {len(told)} conditions equal the declared ones")
    if asked.json:
        found = {"seed": asked.seed, "equal": equal, "faults": len(told), "apart": APART, "each": told}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(equal < PROMISED * len(told))


if __name__ == "__main__":
    main()
