"""The planned data can tell wrong from right: no standard wrong output passes the judge's comparison on them."""

from collections.abc import Iterator

import pytest

from harness.cases import Case, plan
from harness.cases.request import Request
from harness.power import power, power_of
from harness.stages import stage_module
from harness.wrong_outputs import EXPERTS, GROUPED_LINEAR, ROUTER, SHARED_EXPERT_GATE, wrong_outputs

LARGEST = 3e6  # products T * k * H * I of a case that is worth its time here

# (stage, wrong output, predicate of the case): where the data cannot tell, whatever is drawn.
INHERENT = (
    ("router", "other_scoring", lambda c: c.data in ("negative", "far_negative")),  # sigmoid(x) is exp(x) there
    ("router", "other_scoring", lambda c: c.data == "peaked" and c.E <= 2),  # both are 1
    ("router", "renormalisation_flipped", lambda c: c.data == "peaked" and c.scoring == "softmax"),  # the sum is 1
    ("router", "last_choice_next_best", lambda c: c.data == "far_negative"),  # scores of 1e-9 and below, tied
    ("router", "last_choice_next_best", lambda c: c.T == 1 and c.dtype == "bf16"),  # one row, equal logits in bf16
    ("router", "groups_ignored", lambda c: c.T == 1 or c.E <= 8),  # nobody chose outside the best groups
    ("router", "groups_ignored", lambda c: c.data == "negative" and c.bias != "none"),  # the bias alone decides
    ("router", "bias_dropped", lambda c: c.data == "peaked" and c.E <= 8),  # the peak outweighs any bias
    ("router", "first_experts_chosen", lambda c: c.E <= 3),  # they are the best by chance
    ("experts", "flat_weights", lambda c: c.routing == "duplicates" and c.k == 2),  # both slots on one expert
    ("experts", "last_of_I_dropped", lambda c: c.dtype == "bf16" and c.T <= 2 and c.I > 100),  # under bf16's roundings
    ("shared_expert_gate", "last_of_H_dropped", lambda c: c.D == 1 and c.dtype != "fp32"),  # one element a row
    ("experts", "other_activation", lambda c: c.data == "exact"),  # both saturate: the numeric cases are for that
)  # fmt: skip


def planned(stage: str, check: str) -> Iterator[Case]:
    for item in plan(stage, Request()):
        case = item.case
        cost = getattr(case, "T", 1) * getattr(case, "k", 1) * getattr(case, "H", 1) * getattr(case, "I", 1)
        if item.check == check and cost <= LARGEST:
            yield case


def powerless(cases: Iterator[Case]) -> dict[str, list[str]]:
    """Case id -> accepted wrong outputs that have no inherent reason."""
    found = {}
    for case in cases:
        excused = {name for stage, name, holds in INHERENT if stage == case.stage and holds(case)}
        accepted = [name for name in power_of(case) if name not in excused]
        if accepted:
            found[case.id()] = accepted
    return found


@pytest.mark.parametrize("stage", ["experts", "grouped_linear", "shared_expert_gate"])
def test_numeric_cases_reject_every_wrong_output(stage: str) -> None:
    assert powerless(planned(stage, "numeric")) == {}


def test_routing_cases_reject_every_wrong_output() -> None:
    assert powerless(planned("router", "routing")) == {}


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("experts", EXPERTS),
        ("router", ROUTER),
        ("grouped_linear", GROUPED_LINEAR),
        ("shared_expert_gate", SHARED_EXPERT_GATE),
    ],
)
def test_every_wrong_output_applies_somewhere(stage: str, names: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for case in planned(stage, "routing" if stage == "router" else "numeric"):
        seen |= set(wrong_outputs(stage_module(stage).build(case, "cpu")))
        if seen == set(names):
            break
    assert seen == set(names)


def test_tiny_inputs_are_found_powerless() -> None:
    """The guard guards: where the pre-activations vanish, SiLU, GELU and a swapped pair agree."""
    case = next(c for c in planned("experts", "numeric") if c.T == 33 and c.dtype == "bf16")
    call = stage_module("experts").build(case, "cpu")
    call.args["hidden_states"].mul_(1e-4)
    assert {"other_activation", "gate_up_swapped"} <= set(power(call))


def test_unknown_stage_is_told() -> None:
    case = next(iter(plan("moe_block", Request()))).case
    with pytest.raises(ValueError, match="grouped_linear"):
        wrong_outputs(stage_module("moe_block").build(case, "cpu"))
