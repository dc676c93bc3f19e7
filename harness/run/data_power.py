"""The power of a data set: which standard wrong outputs the judge would accept on it.

Before a data set judges anything, the mistakes of `harness.core.wrong_outputs` have to be rejected on it.  They are
made for `ROWS` of its rows and compared with the bound that the judgement needs anyway; only where one of them passes
are more rows looked at, with every statistic of the judge.  A data set that cannot tell them apart is
replaced by one that can:
the same recipe with another seed, then the stage's ordinary data of the same shape.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_harness.harness.core.bounds import Bound, max_limit
from moe_harness.harness.core.call import DTYPES, Call
from moe_harness.harness.core.case import Case
from moe_harness.harness.core.compare import against_bound, exactly
from moe_harness.harness.core.invocation import PART, Trial, right_result
from moe_harness.harness.core.rows import count, matrix, spread
from moe_harness.harness.core.stage import stage_module
from moe_harness.harness.core.wrong_outputs import Wrong, wrong_outputs
from moe_harness.harness.stages.router import stage as router
from moe_harness.reference.experts import local_ids

ROWS, MORE_ROWS = 3, 32  # looked at first, and before a data set is called powerless
SEEDS = 3  # tried of a recipe before it is given up
ALL = "all"
STEP = 50_021  # between these seeds: prime, so that no planned seed is met

# The checks whose verdict is a comparison with the reference; the others compare an implementation with itself.
JUDGING = frozenset(
    ("contract", "exact", "numeric", "routing", "property", "sentinels", "layouts", "special", "memory", "graph_replay",
     "side_stream", "large_offsets")
)  # fmt: skip


def _one_exact_row(case: Any) -> bool:
    return case.data == "exact" and case.rows() == 1


# (stage, wrong output or all, predicate of the case, why): where the data cannot tell, whatever is drawn.
EXCUSED: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("experts", "flat_weights", lambda c: c.routing == "duplicates" and c.k == 2, "both slots on one expert"),
    ("experts", "flat_weights", lambda c: c.layout == "expert_map:expanded", "every slot on one expert"),
    ("experts", "other_activation", lambda c: c.data in ("exact", "outside_fp16"), "both saturate"),
    ("grouped_linear", "groups_shifted_by_a_row", lambda c: c.layout == "weight:expanded", "all experts are one"),
    ("grouped_linear", "experts_rotated", lambda c: c.layout == "weight:expanded", "all experts are one"),
    ("grouped_linear", "one_row_to_wrong_expert", lambda c: c.layout == "weight:expanded", "all experts are one"),
    ("grouped_linear", "bias_of_next_expert", lambda c: c.layout == "bias:expanded", "all biases are one"),
    ("shared_expert_gate", "gate_of_next_row", lambda c: c.layout == "hidden_states:expanded", "all rows are one"),
    ("shared_expert_gate", "gate_of_next_row", lambda c: c.data == "saturated", "every gate is 1"),
    ("shared_expert_gate", "ungated", lambda c: c.data == "saturated", "every gate is 1"),
    ("shared_expert_gate", "ungated", _one_exact_row, "the only gate is 1"),
    ("shared_expert_gate", ALL, lambda c: c.data == "saturated_off", "zeros are right"),
    ("router", "other_scoring", lambda c: c.data in ("negative", "far_negative"), "sigmoid(x) is exp(x) there"),
    ("router", "other_scoring", lambda c: c.data == "peaked" and c.E <= 2, "both scores are 1"),
    ("router", "renormalisation_flipped", lambda c: c.data == "peaked" and c.scoring == "softmax", "the sum is 1"),
    ("router", "last_choice_next_best", lambda c: c.data == "far_negative", "scores of 1e-9 and below are tied"),
    ("router", "one_weight_off", lambda c: c.data == "far_negative", "1e-5 is good to a roundoff of 1"),
    ("router", "one_weight_off", lambda c: c.data == "underflow", "the weights of that row are open"),
    ("router", "groups_ignored", lambda c: c.data == "negative" and c.bias != "none", "the bias alone decides"),
    ("router", "groups_ignored", lambda c: c.T == 1, "the best experts of one row are mostly in its best groups"),
    ("router", "bias_dropped", lambda c: c.data == "peaked" and c.E <= 8, "the peak outweighs any bias"),
    ("router", "row_of_next_token", lambda c: c.layout == "router_logits:expanded", "all rows are one"),
    ("router", "row_of_next_token", lambda c: c.data == "constant", "all rows are one"),
    ("router", "flat_weights", lambda c: c.data == "constant", "all scores are equal"),
    ("router", "weights_reversed", lambda c: c.data == "constant", "all scores are equal"),
    ("router", "other_scoring", lambda c: c.data == "constant", "all scores are equal"),
    ("router", "last_choice_next_best", lambda c: c.data == "constant", "all scores are equal"),
    ("router", "first_experts_chosen", lambda c: c.data == "constant", "all scores are equal"),
)


@dataclass(frozen=True)
class Proof:
    """A data set that may judge, or none: `case` is None where no data with power were found."""

    case: Case | None
    rejected: int = 0  # wrong outputs that were rejected on it; 0 where none applies to the case
    accepted: list[str] = field(default_factory=list)  # what the planned data would have accepted

    def as_dict(self) -> dict[str, Any]:
        return {"rejected": self.rejected, "accepted": self.accepted}


def prove(trial: Trial, case: Case) -> Proof:
    """Find data for a case that reject every wrong output: the planned ones, or what takes their place.

    The call it was proved on is the one that `trial.build` returns next.
    """
    first: list[str] | None = None
    for candidate in _candidates(case):
        names, tried = accepted(trial.prepare(candidate), trial.subject.declared.rounds)
        first = names if first is None else first
        if not names:
            return Proof(candidate, tried, first)
    return Proof(None, 0, first or [])


def _candidates(case: Case) -> Iterator[Case]:
    yield case
    for recipe in dict.fromkeys((case.data, "normal")):
        for turn in range(1, SEEDS + 1):
            yield case.but(data=recipe, seed=case.seed + turn * STEP)


def accepted(call: Call, declared: tuple[str, ...] | None = None) -> tuple[list[str], int]:
    """(names of the wrong outputs that pass the judge's comparison without an excuse, how many were tried)."""
    if count(call) > PART:
        call = spread(call, torch.arange(count(call)), PART)
    if call.truth is None:
        call.truth = right_result(call, declared)
    rows = _telling_rows(call)
    sample = spread(call, rows, ROWS)
    wrong = wrong_outputs(sample)
    tried = len(wrong)
    passing = [name for name in _passing(sample, wrong) if not excused(call.case, name)]
    if passing:
        if len(rows) > ROWS:
            sample = spread(call, rows, MORE_ROWS)
            wrong = wrong_outputs(sample)
        passing = [name for name in passing if name in wrong and not _judge_rejects(sample, wrong[name], declared)]
    return passing, tried


def power_of(case: Case, device: str = "cpu") -> list[str]:
    """Names of the wrong outputs that pass on a case as it is planned, every permitted rounding allowed."""
    return accepted(stage_module(case.stage).build(case, device))[0]


def excused(case: Case, name: str) -> str | None:
    """Why no data of this kind can reject a wrong output; None where they should."""
    for stage, wrong, holds, why in EXCUSED:
        if stage == case.stage and wrong in (ALL, name) and holds(case):
            return why
    return None


# --------------------------------------------------------------------------------------------------------------- sample


def _telling_rows(call: Call) -> Tensor:
    """Rows that a mistake shows in: not those in which zeros are right, or NaN is."""
    truth = call.truth.value if isinstance(call.truth, Bound) else call.truth
    rows = matrix(next(iter(call.args.values())) if truth is None else truth)
    telling = rows.isfinite().all(-1)
    if call.case.stage == "experts":
        telling &= (local_ids(call.args["topk_ids"], call.keywords["expert_map"]) >= 0).any(-1)
    return telling.nonzero()[:, 0]


# ------------------------------------------------------------------------------------------------------------ judgement


def _passing(call: Call, wrong: Wrong) -> list[str]:
    """Wrong outputs that no element alone gives away, all of them compared at once."""
    if not wrong:
        return []
    if call.truth is None:
        return _passing_choices(call, wrong)
    stacked = torch.stack(list(wrong.values())).to(DTYPES[call.case.dtype])
    if isinstance(call.truth, Tensor):
        rejected = stacked.double() != call.truth
    else:
        rejected = ~(call.truth.z(stacked).abs() <= max_limit())
    return [name for name, bad in zip(wrong, rejected.flatten(1).any(1).tolist(), strict=True) if not bad]


def _passing_choices(call: Call, wrong: Wrong) -> list[str]:
    """As `_passing`, of the router: every wrong choice is one more block of rows with the same logits."""
    weights, ids = (torch.cat(parts) for parts in zip(*wrong.values(), strict=True))
    logits = call.args["router_logits"]
    many = Call(call.case, {"router_logits": logits.repeat(len(wrong), 1)}, call.keywords)
    bad = router.wrong_rows(many, weights.float(), ids).view(len(wrong), -1).any(-1)
    return [name for name, rejected in zip(wrong, bad.tolist(), strict=True) if not rejected]


def _judge_rejects(call: Call, wrong: Any, declared: tuple[str, ...] | None) -> bool:
    """Whether the judge itself does, with the statistics that it makes of many elements."""
    stage = stage_module(call.case.stage)
    if call.truth is None:
        return bool(stage.compare(call, (wrong[0].float(), wrong[1]), declared).findings)
    result = wrong.to(DTYPES[call.case.dtype])
    judged = exactly if isinstance(call.truth, Tensor) else against_bound
    return bool(judged(stage, call, call.truth, result).findings)
