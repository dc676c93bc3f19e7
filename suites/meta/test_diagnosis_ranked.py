"""Over many ranks faults are named by their bits; what is right, or in no catalogue, is not."""

from functools import partial

import pytest
from torch import Tensor

from moe_harness.harness.core.catalogue import RANKED, Fault, all_faults
from moe_harness.harness.core.plan import Request
from moe_harness.harness.core.ranked_stage import find_ranked
from moe_harness.harness.diagnosis import ranked
from moe_harness.harness.diagnosis.ranked import named
from moe_harness.harness.run import session
from moe_harness.harness.run.session import RunOptions
from moe_harness.harness.stages.dispatcher.faults._bases import Copies, Gathered, Rows

GENEROUS = 60.0
SEEN_IN_VALUES = [f for f in all_faults() if f.stage in RANKED and f.shows["seen_by"] == find_ranked(f.stage).checks[0]]
# One function of the data each: without a reduction nothing is seen of the rest, and slots are summed in either order.
EQUAL = ({"never_reduced", "no_op_base_class"}, {"results_in_order_of_arrival", "permutation_for_inverse"})


@pytest.mark.nightly
@pytest.mark.parametrize("fault", SEEN_IN_VALUES, ids=lambda fault: fault.name)
def test_every_fault_is_named(fault: Fault) -> None:
    told = [entry["fault"] for entry in named(fault.spec, fault.shows["case"], GENEROUS)]
    assert fault.name in told
    assert len(told) == 1 or set(told) in EQUAL


@pytest.mark.parametrize("name", ["finalize_not_reverse", "gate_row_parallel", "reduced_twice", "weights_not_sent"])
def test_a_fault_is_named(name: str) -> None:
    fault = next(f for f in SEEN_IN_VALUES if f.name == name)
    told = named(fault.spec, fault.shows["case"], GENEROUS)
    assert [entry["fault"] for entry in told] == [name]
    assert fault.consequence in told[0]["evidence"]


class AnotherReverse(Copies):
    """`finalize_not_reverse` by another way of communication."""

    source = Gathered.source

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        right = super().combine(out, d)
        every = Gathered.gather(self, right, self.counts(len(right)))
        end = len(every) - sum(self.counts(len(right))[: self.rank])
        return every[end - len(right) : end]


def test_a_fault_is_named_whoever_computes_it() -> None:
    fault = next(f for f in SEEN_IN_VALUES if f.name == "finalize_not_reverse")
    spec = f"{__name__}:AnotherReverse"
    assert [entry["fault"] for entry in named(spec, fault.shows["case"], GENEROUS)] == ["finalize_not_reverse"]


class LastRowNegated(Gathered):
    """In no catalogue."""

    def combine(self, out: Tensor, d: Rows) -> Tensor:
        right = super().combine(out, d)
        right[-1:] *= -1
        return right


@pytest.mark.parametrize(
    "spec", [f"{__name__}:LastRowNegated", "moe_harness.harness.stages.dispatcher.faults._bases:Copies"]
)
def test_what_no_fault_explains_has_no_name(spec: str) -> None:
    assert named(spec, "dispatcher/dense/R=2,E=4,k=2,T=3+3", GENEROUS) == []


def test_right_results_that_cost_too_much_have_no_wrong_cause() -> None:
    spec = "moe_harness.harness.stages.dispatcher.faults.state:copies_to_everybody"
    assert named(spec, "dispatcher/dense/R=2,E=4,k=2,T=3+3", GENEROUS) == []


def test_a_run_names_the_cause_of_its_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "named", partial(named, seconds=GENEROUS))  # on a busy machine a run's 5 s are too few
    spec = "moe_harness.harness.stages.dispatcher.faults.rows:finalize_not_reverse"
    result = session.judge("dispatcher", spec, Request(), RunOptions(fail_fast=True), worlds=(2,))
    assert result["failures"][0]["diagnosis"][0]["fault"] == "finalize_not_reverse"
