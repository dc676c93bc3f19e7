"""Failures put together by condition: planted rules over the real plans of the stages, and a real kernel's."""

import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from moe_harness.harness.core.findings import Answer, Finding, Record
from moe_harness.harness.core.plan import Request, plan
from moe_harness.harness.diagnosis.clusters import VALUE, Outcome, cluster, kind_of, words_of
from moe_harness.harness.diagnosis.conditions import Condition, shortest, terms_of
from moe_harness.harness.report.words import cluster_lines
from moe_harness.harness.run.result_builder import Listener, ResultBuilder, _by_cause, cause_of
from moe_harness.suites.meta.conditions import DECLARED

RULES = {
    "bias=negative and E no power of two": ("router", lambda c: c.bias == "negative" and bool(c.E & (c.E - 1))),
    "k >= 9": ("router", lambda c: c.k > 8),
    "scoring=sigmoid": ("router", lambda c: c.scoring == "sigmoid"),
    "activation=gelu_tanh": ("experts", lambda c: c.activation == "gelu_tanh"),
    "routing=duplicates": ("experts", lambda c: c.routing == "duplicates"),
    "k = E": ("experts", lambda c: c.k == c.E),
    "masked not none": ("experts", lambda c: c.masked != "none"),
    "I no multiple of 16": ("experts", lambda c: c.I % 16 != 0),
    "dtype=bf16 and T >= 33": ("experts", lambda c: c.dtype == "bf16" and c.T > 32),
    "groups not in (1x1, none)": ("router", lambda c: c.groups not in ("1x1", "none")),
    "scale not 1.0": ("router", lambda c: c.scale != 1),
    "always": ("experts", lambda c: True),
}


def outcomes(stage, *rules, profile="quick", seed=0):
    """What a run would see of a kernel that is wrong where one of the rules says so; wrong where anything can be."""
    found = []
    for planned in plan(stage, Request(profile=profile, seed=seed)):
        kinds = [kind for kind, rule in rules if planned.case.shows() and rule(planned.case)]
        found.append(Outcome(planned.check, planned.case, planned.id, kinds[0] if kinds else None))
    return found


@pytest.mark.parametrize("name", RULES)
def test_a_planted_rule_is_found_and_holds_on_cases_of_another_plan(name):
    stage, rule = RULES[name]
    (found,) = cluster(outcomes(stage, (VALUE, rule)))
    assert found.condition is not None and found.passing == 0
    unseen = [p.case for p in plan(stage, Request(profile="full", seed=7)) if p.case.shows()]
    wrong = [case.id() for case in unseen if found.condition.holds(case) != rule(case)]
    assert len(wrong) <= 0.02 * len(unseen), (str(found.condition), wrong[:5])


def test_two_rules_are_two_clusters_the_larger_first():
    wide, bf16 = (lambda c: c.k > 8), (lambda c: c.dtype == "bf16" and c.T > 32)
    found = cluster(outcomes("router", ("a", wide), ("b", bf16)))
    assert [each.kinds for each in found[:2]] in ([("a",), ("b",)], [("b",), ("a",)])
    assert len(found[0].failing) >= len(found[1].failing)
    assert {str(each.condition) for each in found[:2]} >= {"k >= 9"}
    (one, other, *_) = cluster(outcomes("router", (VALUE, wide), (VALUE, bf16)))  # of one kind, told apart all the same
    assert "k >= 9" in {str(one.condition), str(other.condition)}


def test_an_interval_of_one_value_is_that_value():
    """Of parts of the failures limits were looked at first, as they hold for more: it read `H <= 64 and H >= 64`."""
    square, many = (lambda c: c.H == 64), (lambda c: c.k == 8 and c.T > 16)
    found = cluster(outcomes("experts", (VALUE, lambda c: square(c) or many(c))))
    assert {str(each.condition) for each in found} >= {"H=64", "k=8 and T >= 17"}


A, B = "uniform", "skewed"
GRID = [{"T": t, "H": h, "routing": r} for t in (1, 5, 17, 33, 64) for h in (16, 48, 64) for r in (A, B, "one", "last")]


@pytest.mark.parametrize(
    ("long", "short"),
    [
        (("H >= 48", "H <= 48"), "H=48"),
        (("H >= 48", "H=48"), "H=48"),  # said by one of the two
        (("H <= 48", "H no power of two", "T >= 17"), "T >= 17 and H=48"),
        (("T >= 17", "T <= 33"), "17 <= T <= 33"),
        (("T >= 5", "T <= 17", "routing=one"), "routing=one and 5 <= T <= 17"),
        (("T >= 5", "T >= 17"), "T >= 17"),
        (("H <= 48", "H a multiple of 16"), "H <= 48"),
        (("routing not one", "routing not last"), "routing not in (last, one)"),
        (("routing not one", "routing not last", "routing not skewed"), "routing=uniform"),
        (("routing not in (last, one)", "routing not skewed"), "routing=uniform"),
        (("T >= 17", "H >= 48"), "T >= 17 and H >= 48"),  # as short as can be
    ],
)
def test_what_a_condition_says_is_said_in_the_fewest_words(long, short):
    every = {term.text: term for term in terms_of(GRID, [])}
    every |= {
        term.text: term
        for pair in combinations(("uniform", "skewed", "one", "last"), 2)
        for term in terms_of([a for a in GRID if a["routing"] in pair], [a for a in GRID if a["routing"] not in pair])
    }
    condition = Condition(tuple(every[text] for text in long))
    failing = [axes for axes in GRID if all(term.holds(axes) for term in condition.terms)]
    told = shortest(condition, failing, [axes for axes in GRID if axes not in failing])
    assert str(told) == short
    assert [all(term.holds(axes) for term in told.terms) for axes in GRID] == [axes in failing for axes in GRID]


def test_failures_at_random_have_no_condition_and_none_is_made_up():
    chance = random.Random(3)
    found = cluster(outcomes("experts", (VALUE, lambda c: chance.random() < 0.1)))
    without = [each for each in found if each.condition is None]
    assert without and sum(len(each.failing) for each in without) >= 0.3 * sum(len(each.failing) for each in found)
    assert all(each.passing <= 0.05 * len(each.failing) for each in found)


@pytest.mark.parametrize("judged", [1, 4, 12])
def test_one_failing_case_beside_few_has_no_condition(judged):
    """What --fail-fast ends with: every axis of the one case tells it from a handful of others."""
    ran = [o for o in outcomes("experts", (VALUE, lambda c: False)) if o.check == "numeric"][:judged]
    (found,) = cluster([*ran[:-1], replace(ran[-1], kind=VALUE)])
    assert found.condition is None and found.passing + found.others == judged - 1


def test_one_failing_case_with_the_only_value_of_an_axis_beside_many_has_a_condition():
    planned = [outcome for outcome in outcomes("experts", (VALUE, lambda c: False)) if outcome.check == "numeric"]
    case = planned[0].case.but(T=7919)
    (found,) = cluster([*planned, Outcome("numeric", case, case.id(), VALUE)])
    assert str(found.condition) in ("T=7919", "T >= 7919")


def test_no_failure_is_no_cluster():
    assert cluster(outcomes("experts")) == []


def test_what_a_check_cannot_see_does_not_hide_the_condition():
    blind = iter(range(10**6))
    found = cluster(outcomes("experts", (VALUE, lambda c: c.k > 1 and next(blind) % 40 != 0)))
    assert str(found[0].condition) == "k >= 2" and 0 < found[0].passing <= 0.05 * len(found[0].failing)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("element [3, 45] is 1.87704, but should be -0.97 within 6e-07: 4.5e+06 sigma away", VALUE),
        ("topk_weights[17, 1] (expert 6) is -0.49, but should be 0.49", VALUE),
        (
            "topk_ids[0] is [8, 8, 8], but its ids should be distinct",
            "topk_ids[#] is [#], but its ids should be distinct",
        ),
        ("raised RuntimeError: size 17\n  at kernel.py:3", "raised RuntimeError: size #"),
    ],
)
def test_kinds_are_messages_without_their_numbers(message, kind):
    assert kind_of(message) == kind


def test_numbers_that_all_failures_share_are_told():
    """A hang was "no answer within its budget of # s"."""
    late = "no answer within its budget of {} s: it hangs"
    kind = kind_of(late.format(20))
    assert words_of(kind, [late.format(20), late.format(20), "raised RuntimeError: 7"]) == late.format(20)
    assert words_of(kind, [late.format(20), late.format(5)]) == late.format("…")
    assert words_of(VALUE, ["element [3, 45] is 1.877, but should be 2"]) == VALUE


def test_the_result_tells_clusters_with_counts_and_a_replay_line():
    account = ResultBuilder("experts", "kernel.py:f", Request(), Listener())
    for planned in plan("experts", Request()):
        wrong = planned.case.k > 8
        record = Record(findings=[Finding("element [0, 0] is 1", 2.0)] if wrong else [])
        account.take(Answer(planned.id, "failed" if wrong else "passed", record=record))
    result = account.result()
    (found,) = result["clusters"]
    assert result["judged"] == 1.0
    assert {"cause", "condition", "failed", "passed", "case", "replay"} <= set(found)
    assert found["condition"] == "k >= 9" and found["passed"] == 0 and found["passed_without"] > 100
    assert found["replay"] == f"moe-harness replay {found['case']} --impl kernel.py:f"
    assert cluster_lines(found)[1].startswith(f"{found['failed']} of {found['failed']} cases with k >= 9, 0 of ")


def test_data_that_see_little_decide_between_conditions_that_explain_the_rest_alike():
    """One exact case in ten passes although the rule holds: no condition is made of that."""
    always = iter(range(10**6))
    blind = lambda c: c.data != "exact" or next(always) % 10 != 0  # noqa: E731
    (found,) = cluster(outcomes("experts", (VALUE, blind)))
    assert str(found.condition) == "always"


def test_one_condition_with_passing_cases_is_told_rather_than_many_without():
    """Peaked and far logits hide a normalisation: what can be said in one term is."""
    blind = iter(range(10**6))
    found = cluster(outcomes("router", (VALUE, lambda c: not c.renorm and next(blind) % 5 != 0)))
    assert [str(each.condition) for each in found] == ["renorm=0"]
    assert 0.1 * len(found[0].failing) < found[0].passing < 0.4 * len(found[0].failing)


def test_all_values_but_two_are_one_condition_also_where_some_cases_pass() -> None:
    """Of two terms only the first was told: it holds for the passing cases of 1x1 as well."""
    blind = iter(range(10**6))
    (found,) = cluster(outcomes("router", (VALUE, lambda c: c.groups not in ("none", "1x1") and next(blind) % 5 != 0)))
    assert str(found.condition) == "groups not in (1x1, none)" and found.passing <= 0.2 * len(found.failing)


def test_data_that_see_little_tell_a_term_where_they_pass_without_it_and_seldom_with_it():
    """I of 1 is planned with exact data alone: gate and up of one column each have no order."""
    count = iter(range(10**6))
    (found,) = cluster(outcomes("experts", (VALUE, lambda c: c.I > 1 and (c.data != "exact" or next(count) % 10))))
    assert str(found.condition) == "I >= 2"


def test_the_conditions_that_were_measured_are_those_declared():
    told = json.loads((Path(__file__).resolve().parents[2] / "docs" / "conditions.json").read_text())
    assert {entry["fault"] for entry in told["each"]} == set(DECLARED)


def failures(*causes: str | None) -> list:
    return [{"diagnosis": [{"fault": cause, "evidence": ""}] if cause else [], "known": 26} for cause in causes]


@pytest.mark.parametrize(
    ("causes", "name"),
    [
        (["gate_up_swapped", "gate_up_swapped", None], "gate_up_swapped"),
        ([None, None, "all_zeros", None, None], None),  # a LayerNorm of one column is zero, and only there
        (["a", None], "a"), (["a", "b", None], None), ([None], None), ([], None),
    ],
)  # fmt: skip
def test_what_most_cases_contradict_is_no_cause_of_a_cluster(causes: list, name: str | None) -> None:
    assert cause_of([*failures(*causes), {"diagnosis": []}]) == name


def of_cause(cause: str | None, failed: int, condition: str | None) -> dict:
    return {"cause": cause, "kinds": ["wrong values"], "condition": condition, "failed": failed, "passed": 1,
            "passed_without": 9, "case": f"c{failed}", "replay": f"replay c{failed}"}  # fmt: skip


def test_clusters_of_one_cause_are_one_with_the_condition_of_its_largest_part_first():
    """A sampler without its temperature had six clusters of that cause, and twelve failures in full beneath."""
    parts = [of_cause("a", n, None if n == 2 else f"k={n}") for n in (9, 4, 3, 2, 1)]
    found = _by_cause([*parts[:2], of_cause(None, 8, "T=1"), *parts[2:], of_cause(None, 1, None)])
    assert [(each["cause"], each["failed"]) for each in found] == [("a", 19), (None, 8), (None, 1)]
    assert found[0]["case"] == "c9" and found[0]["condition"] is None
    assert cluster_lines(found[0]) == ("a", "19 cases: 9 of 10 with k=9; 4 of 5 with k=4; 3 of 4 with k=3; 3 more")
    assert _by_cause(parts[:2])[0]["condition"] == "k=9 or k=4"


def test_the_first_of_two_calls_fails_in_the_words_of_one():
    assert kind_of("first call: row 3 is token 4, which cannot be drawn (top_k 8: 2 can)") == kind_of(
        "row 16 is token 40, which cannot be drawn (temperature 0.7, top_p 0.8: 9 tokens can)"
    )
