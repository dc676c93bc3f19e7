"""How often the condition found for a fault equals the declared one; python -m moe_harness.suites.meta.conditions

Each fault of `DECLARED` is judged like any implementation.  The conditions of its clusters, any of which may hold, are
then compared with the declared one, written as a predicate over cases, on the cases of another plan (full profile,
another seed) that the run has not seen: equal where at most `APART` of them are told differently.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_harness.harness.core.case import Case
from moe_harness.harness.core.catalogue import all_faults
from moe_harness.harness.core.plan import plan
from moe_harness.harness.core.request import Request
from moe_harness.harness.diagnosis.clusters import Cluster
from moe_harness.harness.process.pool import Pool, prepare, worker_count
from moe_harness.harness.run.result_builder import Listener, ResultBuilder

APART = 0.02
MOST_ROWS = 600  # of a case; what is larger takes most of the time and adds little
CHECKS = {"router": ("contract", "routing", "layouts"), "experts": ("contract", "exact", "numeric", "layouts"),
          "grouped_linear": ("contract", "numeric"), "shared_expert_gate": ("contract", "numeric")}  # fmt: skip
Declared = Callable[[Any], bool]


# What the catalogue says in words; only what the axes of a plan can say is here.
DECLARED: dict[str, Declared] = {
    "softmax_after_topk": lambda c: c.scoring == "softmax" and not c.renorm and c.E > 1,
    "always_renormalised": lambda c: not c.renorm,
    "never_renormalised": lambda c: c.renorm,
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
}


def measure(names: Iterable[str], seed: int) -> list[dict[str, Any]]:
    """For each fault: the declared condition in words, those found, and the share of unseen cases told differently."""
    prepare()
    faults = {fault.name: fault for fault in all_faults() if fault.name in set(names)}
    told = []
    for name, fault in faults.items():
        clusters = _clusters(fault, seed)
        plans = plan(fault.stage, Request(profile="full", seed=seed + 1))
        empty = name == "raises_on_empty_logits"
        unseen = [p.case for p in plans if p.check in CHECKS[fault.stage] and (empty or p.case.shows())]
        apart = sum(_found(clusters, case) != bool(DECLARED[name](case)) for case in unseen) / len(unseen)
        told.append({"fault": name, "stage": fault.stage, "declared": fault.condition, "apart": round(apart, 4),
                     "found": [str(each.condition) for each in clusters], "equal": apart <= APART})  # fmt: skip
        print(json.dumps(told[-1]), flush=True)
    return told


def _found(clusters: Iterable[Cluster], case: Case) -> bool:
    return any(each.condition is not None and each.condition.holds(case) for each in clusters)


def _clusters(fault: Any, seed: int) -> list[Cluster]:
    request = Request(seed=seed)
    account = ResultBuilder(fault.stage, fault.spec, request, Listener())
    ids = [p.id for p in plan(fault.stage, request) if p.check in CHECKS[fault.stage] and p.case.rows() <= MOST_ROWS]
    with Pool(fault.stage, fault.spec, "cpu", worker_count("cpu"), 60.0) as pool:
        pool.start()
        for answer in pool.judge(ids):
            account.take(answer)
    return account.clustered()


def main() -> None:
    """Measure and write docs/conditions.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", nargs="*", default=list(DECLARED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    told = measure(asked.faults, asked.seed)
    equal = sum(entry["equal"] for entry in told)
    print(f"{equal} of {len(told)} conditions equal the declared ones")
    if asked.json:
        asked.json.write_text(
            json.dumps({"equal": equal, "faults": len(told), "apart": APART, "each": told}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
