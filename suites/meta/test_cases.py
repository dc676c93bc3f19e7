"""Cases are data: ids replay, plans repeat, exact data are exact, pairs are covered."""

from importlib import import_module
from itertools import combinations

import pytest
import torch

from moe_harness.harness.core import bounds, contracts
from moe_harness.harness.core.boundaries import LAYOUTS
from moe_harness.harness.core.bounds import DTYPES
from moe_harness.harness.core.case import parse_id
from moe_harness.harness.core.contracts import STAGES
from moe_harness.harness.core.findings import MAX_Z
from moe_harness.harness.core.plan import ON_CUDA_ONLY, Request, pairwise, plan
from moe_harness.harness.core.stage import find_stage
from moe_harness.harness.process.pool import INTERPRETED_STEPS
from moe_harness.harness.stages.experts import exact
from moe_harness.harness.stages.experts.stage import STAGE as experts
from moe_harness.reference.experts import expert_steps, local_ids, routed_rows


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_every_planned_case_replays_from_its_id(stage, profile):
    for planned in plan(stage, Request(profile=profile, seed=3)):
        assert parse_id(planned.id) == (stage, planned.check, planned.case)


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_repeats_and_its_seed_matters(stage):
    ids = [p.id for p in plan(stage, Request(seed=5))]
    assert ids == [p.id for p in plan(stage, Request(seed=5))]
    assert ids != [p.id for p in plan(stage, Request(seed=6))]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_the_dtypes_that_are_asked_for_are_planned(stage, device):
    for dtype in contracts.DTYPES:
        assert {p.case.dtype for p in plan(stage, Request(device=device, dtypes=(dtype,)))} == {dtype}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("profile", ["quick", "full"])
@pytest.mark.parametrize("dtype", contracts.DTYPES)
def test_every_check_of_a_suite_has_cases_whatever_the_dtype(stage, profile, dtype):
    """A check without a case would be skipped, and skipped looks green."""
    suite = import_module(f"moe_harness.suites.{stage}.test_{stage}")
    checks = {name.removeprefix("test_") for name in vars(suite) if name.startswith("test_")}
    request = Request(profile=profile, device="cuda", dtypes=(dtype,))
    assert {p.check for p in plan(stage, request)} | {"property"} == checks


@pytest.mark.parametrize("stage", STAGES)
def test_every_special_value_layout_and_law_is_planned(stage):
    module, planned = import_module(f"moe_harness.harness.stages.{stage}.cases"), plan(stage, Request())
    assert {p.case.data for p in planned if p.check == "special"} >= set(getattr(module, "SPECIALS", ()))
    assert {p.case.variant for p in planned if p.check == "laws"} == set(getattr(module, "LAWS", ()))
    if stage == "model":  # its operand is a folder
        return
    impossible = {"expanded", "unit"} if stage == "moe_block" else set()  # weights that every checkpoint has in full
    assert {p.case.layout.partition(":")[2] for p in planned if p.check == "layouts"} >= set(LAYOUTS) - impossible


@pytest.mark.parametrize("stage", STAGES)
def test_tritons_interpreter_leaves_out_no_law_and_no_kind_of_data(stage):
    """It skips what has too many tiles: all draws of a sampler were among that, so that a greedy one passed."""
    kinds, judged = set(), set()
    for planned in plan(stage, Request()):
        if planned.check not in (*ON_CUDA_ONLY, "leak"):  # a leak shows in large tensors
            kind = planned.check, planned.case.data, planned.case.variant if planned.check == "laws" else ""
            kinds.add(kind)
            judged |= {kind} if planned.case.steps() <= INTERPRETED_STEPS else set()
    assert judged == kinds


@pytest.mark.parametrize(
    ("case", "rows"),
    [("experts/numeric/T=3,k=4", 12), ("moe_block/numeric/T=3,k=4", 12), ("router/routing/T=3,k=4", 3),
     ("shared_expert_gate/numeric/lead=2x3", 6), ("rms_norm/numeric/lead=2x3", 6), ("rms_norm/numeric/lead=0x3", 0),
     ("model/numeric/variant=tokens,B=2,L=5,new=3", 16), ("dispatcher/dense/R=2,E=4,k=2,T=3+4", 7)],
)  # fmt: skip
def test_a_case_has_as_many_rows_as_its_kernel_computes(case, rows):
    """The smallest failing case is that of the fewest, and one of none decides nothing."""
    assert parse_id(case)[2].rows() == rows


def test_pairwise_covers_every_allowed_pair():
    axes = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (0, 5)}

    def allowed(row):
        return not (row["a"] == 3 and row["b"] == "z")

    rows = pairwise(axes, 1, allowed)
    assert all(allowed(row) for row in rows)
    for (left, lefts), (right, rights) in combinations(axes.items(), 2):
        for pair in ((v, w) for v in lefts for w in rights):
            if {left: pair[0], right: pair[1]} != {"a": 3, "b": "z"}:
                assert any((row[left], row[right]) == pair for row in rows)
    assert len(rows) < 3 * 3 * 2 * 2 / 2


def exact_cases():
    planned = [p for p in plan("experts", Request()) if p.check not in ON_CUDA_ONLY]  # 11 GB, minutes on a CPU
    cases = [p.case for p in planned if p.case.data == "exact"]
    return cases[::7] + [c for c in cases if c.dtype == "bf16" and c.k >= 6][:20]


@pytest.mark.parametrize("case", exact_cases(), ids=lambda case: case.id())
def test_exact_data_are_exact_wherever_they_are_stored(case):
    """Every intermediate value is representable, and the slots' sum in any order, since its absolute sum is."""
    call = experts.build(case, "cpu")
    hidden, gate_up, down, weights, ids = call.args.values()
    dtype, limit = DTYPES[case.dtype], exact.EXACT_INTEGERS[case.dtype]
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for expert, tokens, slots in routed_rows(local_ids(ids, call.keywords["expert_map"])):
        steps = expert_steps(hidden[tokens].double(), gate_up[expert], down[expert], "silu")
        for value in steps:
            rounded = value.float().to(dtype).double()
            assert torch.equal(rounded, value.float().double())
        total.index_add_(0, tokens, weights[tokens, slots, None].double() * steps.output.abs())
    smallest = min(exact.WEIGHTS)
    assert float((total / smallest).max() if total.numel() else 0) <= limit + 1e-6


def test_cancelling_data_cancel():
    """A gate's logit is a sum whose terms nearly meet in pairs, or the case would be an ordinary one."""
    cases = [p.case for p in plan("shared_expert_gate", Request()) if p.case.data == "cancelling"]
    assert cases
    for case in cases:
        call = find_stage("shared_expert_gate").build(case, "cpu")
        products = call.args["hidden_states"].double() * call.args["gate_weight"].double()
        assert bool((products.sum(-1).abs() < 0.1 * products.abs().sum(-1)).all())


def test_the_reports_limit_is_the_judges():
    assert abs(MAX_Z - bounds.max_limit()) < 0.01
