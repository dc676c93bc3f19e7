"""The stage `parallel_linear`: each kind of layer over the planned cases, its faults, heads, and properties.

pytest suites/parallel_linear --impl my_layers.py:MyColumnParallel
"""

import pytest
import torch
from hypothesis import given, settings

from moe_harness.harness.core.catalogue import Fault, all_faults
from moe_harness.harness.core.errors import UsageError
from moe_harness.harness.core.plan import Planned
from moe_harness.harness.core.ranked_subject import load
from moe_harness.harness.ranks import judge
from moe_harness.harness.stages.parallel_linear import cases, rank_task, strategy
from moe_harness.harness.stages.parallel_linear.cases import LinearCase
from moe_harness.reference import parallel_linear as reference
from moe_harness.suites.dispatcher.subjects import chosen, format_findings
from moe_harness.suites.drawing import examples

REGISTERED = ("Replicated", "ColumnParallel", "MergedColumnParallel", "RowParallel")
OF_KIND = {
    "replicated": "Replicated",
    "column": "ColumnParallel",
    "merged_column": "MergedColumnParallel",
    "row": "RowParallel",
}
FAULTS = all_faults("parallel_linear")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", chosen(metafunc.config, tuple(f"parallel:{name}" for name in REGISTERED)))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_keeps_and_computes_its_part(impl: str, world: int) -> None:
    judged = 0
    for case in judge.planned("parallel_linear", impl, [world]):
        verdict = judge.judge(impl, case)
        judged += verdict.unsupported is None
        assert not verdict.findings, format_findings(verdict)
    assert judged, f"{impl} refuses every case: {verdict.unsupported}"


@settings(max_examples=examples(100))
@given(case=strategy.cases())
def test_every_kind_on_drawn_cases(case: LinearCase) -> None:
    verdict = judge.judge(f"parallel:{OF_KIND[case.kind]}", Planned("shard", case).id)
    assert verdict.passed, format_findings(verdict)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen_and_hidden_where_they_say(fault: Fault) -> None:
    verdict = judge.judge(fault.spec, fault.shows["case"])
    assert fault.shows["seen_by"] in {finding.about for finding in verdict.findings}, format_findings(verdict)
    for case in fault.hidden:
        assert judge.judge(fault.spec, case).passed, case


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_killed_by_the_planned_cases(fault: Fault) -> None:
    planned = cases.plan([1, 2, 4], kind=fault.function.kind)
    assert any(judge.judge(fault.spec, entry.id).findings for entry in planned), f"{fault.name} survives"


def test_a_wrong_layer_whose_columns_the_ranks_cannot_share_is_a_finding() -> None:
    """It was an error of the judge: the whole layer was compared with a rank's part of its columns."""
    case = LinearCase(R=2, E=1, K=5, N=4, S="3", kind="replicated")
    weights, x = [[torch.ones(4, 5)]], torch.ones(3, 5)
    assert rank_task._explain(torch.zeros(3, 4).double(), weights, x, case, rank=0) == []
    even = case.but(K=6)
    part = torch.full((3, 4), 3.0).double()
    told = rank_task._explain(part, [[torch.ones(4, 6)]], torch.ones(3, 6), even, rank=0)
    assert [one["fault"] for one in told] == ["row-parallel where replicated is meant"]


def test_the_row_parallel_gate_is_caught_by_name() -> None:
    fault = next(f for f in FAULTS if f.name == "gate_row_parallel")
    diagnosis = judge.judge(fault.spec, fault.shows["case"]).findings[0].diagnosis
    assert diagnosis[0]["fault"] == "row-parallel where replicated is meant"


@pytest.mark.parametrize("base", ["Layer", "Column", "Merged", "Row"])
def test_what_the_faults_are_made_from_is_right(base: str) -> None:
    spec = f"moe_harness.harness.stages.parallel_linear.faults.shards:{base}"
    kind = {"Layer": "replicated", "Column": "column", "Merged": "merged_column", "Row": "row"}[base]
    for planned in cases.plan([1, 2, 4], kind=kind):
        verdict, case = judge.judge(spec, planned.id), planned.case
        assert verdict.passed or (case.optional and verdict.unsupported and not verdict.findings), case.id()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("parallel:Nothing", "does not exist"),
        ("moe_harness.harness.ranks.pool:JobOutcome", "cannot be made by"),
        ("moe_harness.suites.dispatcher.strangers.wrong:Nameless", "of no known kind"),
    ],
)
def test_what_cannot_be_judged_is_a_usage_error(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        judge.planned("parallel_linear", spec, [2])


HeadParallel = load("parallel_linear", "moe_harness.impls.parallel.heads:HeadParallel")
local_heads = load("parallel_linear", "moe_harness.impls.parallel.heads:local_heads")

# Heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "world"), [(4, 1), (4, 2), (4, 4), (4, 8), (2, 8), (1, 4), (6, 3)])
def test_a_rank_holds_whole_heads(heads: int, world: int) -> None:
    weight = torch.arange(heads * 3 * 5.0).view(heads * 3, 5)
    for rank in range(world):
        place = {"rank": rank, "world_size": world, "dtype": torch.float32, "device": "cpu"}
        layer = HeadParallel(5, heads, 3, **place)
        layer.load(0, weight)
        assert torch.equal(layer.weight[0], reference.head_shard(weight, heads, rank, world))


def test_query_heads_meet_their_key_value_head() -> None:
    """32 query and 4 key/value heads over 8 ranks, as in Qwen3-30B-A3B: 8 query heads share one key/value head."""
    for rank in range(8):
        queries, keys = local_heads(32, rank, 8), local_heads(4, rank, 8)
        assert {query // 8 for query in queries} == set(keys)


def test_heads_that_fit_no_number_of_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads is 3, which 4 ranks"):
        local_heads(3, 0, 4)
    with pytest.raises(ValueError, match="num_heads is 6"):
        local_heads(6, 0, 4)
