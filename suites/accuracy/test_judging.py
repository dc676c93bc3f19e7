"""From two sets of rows to a result: pairing, verdict, and what changed besides being right."""

import math
import re
from dataclasses import replace

import pytest

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate import view
from moe_harness.harness.gate.exchange import Answer, Gold
from moe_harness.harness.gate.judging import SAME, Side, judge
from moe_harness.harness.gate.statistics import Paired, needed
from moe_harness.harness.gate.task import Row

STRICT = "strict-match"


def gold(loglikelihood, greedy=(1, 2)):
    likeliest = (((1, -0.01), (7, -5.0)), ((2, -0.02), (9, -4.5)))
    return Gold(loglikelihood, (1, 2), greedy, likeliest)


def rows(count, wrong=(), *, length=20, stop="stop", valid=True, loglikelihood=-1.0):
    return [
        Row(i, f"d{i}", f"p{i}", {STRICT: i not in wrong}, {STRICT: valid},
            Answer(f"k{i}", "wrong" if i in wrong else "right", length, stop, gold(loglikelihood - i % 7 / 1000)))
        for i in range(count)
    ]  # fmt: skip


def judged(baseline, candidate, margin=0.02):
    return judge("arithmetic", STRICT, Side("trusted", baseline), Side("new", candidate), margin)


def test_equal_answers_pass_where_there_are_enough():
    result = judged(rows(200), rows(200))
    assert result["verdict"] == "pass"
    assert (result["documents"], result["drop"], result["discordant"], result["p"]) == (200, 0.0, [0, 0], 1.0)
    assert result["flips"]["answers"] == result["flips"]["tokens"] == 0
    assert result["flips"]["kl"] == pytest.approx(0, abs=1e-12)


def answered(row, **change):
    return replace(row, answer=replace(row.answer, **change))


def test_a_result_holds_the_figures_of_both_sides():
    """Each of them is another number here, so that none stands in the place of another."""
    before, after = rows(100, wrong=range(2)), rows(100, wrong=range(1, 6), length=21)
    for i in (20, 21, 22):
        before[i] = replace(before[i], valid={STRICT: False})
    after[20] = replace(after[20], valid={STRICT: False})
    before[30], after[30:35] = answered(before[30], stop="length"), [answered(r, stop="length") for r in after[30:35]]
    result, counted = judged(before, after), Paired(100, 4, 1)
    share = {"baseline": 0.98, "candidate": 0.95}
    score = {"drop": 0.03, "interval": list(counted.interval), "discordant": [4, 1], "p": counted.p}
    assert result.items() >= score.items() and result["accuracy"] == share
    assert result["filters"] == {STRICT: {"accuracy": share, **score}}
    assert result["needed"] == needed(counted, 0.02) and result["verdict"] == "inconclusive"
    assert result["invalid"] == {"baseline": 0.03, "candidate": 0.01}
    assert result["lengths"] == {
        "baseline": 20.0, "candidate": 21.0, "at_limit": {"baseline": 0.01, "candidate": 0.05}
    }  # fmt: skip
    assert (result["flips"]["answers"], result["flips"]["share"]) == (5, 0.05)
    told = result["rows"][20]
    assert (told["doc_id"], told["doc_hash"], told["prompt_hash"], told["texts"]) == (20, "d20", "p20", None)
    wanted = {"right": True, "valid": False, "stop": "stop", "gold": -1.006}
    assert told["baseline"] == {**wanted, "length": 20} and told["candidate"] == {**wanted, "length": 21}
    assert result["rows"][0]["texts"] == ["wrong", "right"]
    assert [result[name] for name in ("baseline", "candidate", "task", "filter", "margin")] == [
        "trusted", "new", "arithmetic", STRICT, 0.02
    ]  # fmt: skip


def test_one_filter_decides_and_all_are_told():
    """lm-eval's lenient filter may find an answer where the strict one finds none."""
    before, after = (
        [replace(row, right=row.right | {"lenient": True}, valid=row.valid | {"lenient": False}) for row in side]
        for side in (rows(300), rows(300, wrong=range(20)))
    )
    result = judged(before, after)
    assert result["verdict"] == "fail" and result["discordant"] == [20, 0] and result["invalid"]["candidate"] == 0
    assert [result["filters"][name]["discordant"] for name in (STRICT, "lenient")] == [[20, 0], [0, 0]]
    with pytest.raises(CannotJudge, match="no filter 'other', but strict-match, lenient"):
        judge("arithmetic", "other", Side("trusted", before), Side("new", after), 0.02)


def test_two_that_are_the_same_are_told_to_be(tmp_path):
    who = {"identity": {"spec": "triton", "source": "s"}}
    for other, same in ((who, True), ({"identity": {"spec": "triton", "source": "t"}}, False), ({}, False)):
        result = judge("arithmetic", STRICT, Side("a", rows(200), who), Side("b", rows(200), other), 0.02)
        assert result["notes"] == ([SAME] if same else [])
        view.write_html(result, tmp_path / "r.html")
        assert (SAME in (tmp_path / "r.html").read_text()) is same


def test_a_baseline_that_answers_nothing_lets_nobody_pass():
    """Whatever the candidate does, it cannot fall by the margin: such a gate could not fail."""
    wrong = range(1, 300)
    result = judged(rows(300, wrong=wrong), rows(300, wrong=range(300)))
    assert (result["verdict"], result["needed"]) == ("inconclusive", None)
    assert "the baseline itself answers 0.33% right" in view.summary(result)
    assert judged(rows(300, wrong=range(20, 300)), rows(300, wrong=range(20, 300)))["verdict"] == "pass"


def test_equal_answers_decide_nothing_where_there_are_few():
    result = judged(rows(40), rows(40))
    assert (result["verdict"], result["needed"]) == ("inconclusive", 133)


def test_a_baseline_that_can_just_fall_by_the_margin_lets_nobody_pass():
    """By the whole of it, and no further: a drop below the margin cannot be told from any other."""
    assert judged(rows(200, wrong=range(4, 200)), rows(200, wrong=range(4, 200)))["verdict"] == "inconclusive"
    assert judged(rows(200, wrong=range(5, 200)), rows(200, wrong=range(5, 200)))["verdict"] == "pass"


def test_lost_answers_fail_and_won_answers_pass():
    assert judged(rows(300), rows(300, wrong=range(20)))["verdict"] == "fail"
    assert judged(rows(300, wrong=range(20)), rows(300))["verdict"] == "pass"


def test_the_pairing_counts_and_not_the_order_of_the_rows():
    lost = rows(300, wrong=range(20))
    assert judged(rows(300), lost[::-1])["discordant"] == [20, 0]


@pytest.mark.parametrize("change", [{"doc_hash": "other"}, {"prompt_hash": "other"}])
def test_questions_in_other_words_are_not_compared(change):
    candidate = rows(10)
    candidate[3] = replace(candidate[3], **change)
    with pytest.raises(CannotJudge, match="question 3 was put to the two in different words"):
        judged(rows(10), candidate)


@pytest.mark.parametrize("candidate", [rows(9), rows(11), [*rows(9), rows(11)[10]], [*rows(10), rows(10)[0]], []])
def test_other_questions_are_not_compared(candidate):
    with pytest.raises(CannotJudge, match="same ones"):
        judged(rows(10), candidate)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"length": 23}, r"mean length: 20.0 tokens became 23.0 \(\+15%\)"), ({"stop": "length"}, "cut off"),
     ({"valid": False}, "invalid answers: 0.0% became 100.0%"), ({"length": 15}, "mean length")],
)  # fmt: skip
def test_answers_of_another_nature_fail_though_they_are_right(change, told):
    result = judged(rows(200), rows(200, **change))
    assert result["verdict"] == "fail"
    assert len(result["reasons"]) == 1
    assert re.search(told, result["reasons"][0])


def test_a_fall_is_told_before_what_else_changed():
    """A model that answers nothing right is not one with a few more invalid answers."""
    both = view.summary(judged(rows(200), rows(200, wrong=range(190), valid=False)))
    assert re.search(r"^accuracy fell by 95\.00%.*significantly.*; the answers changed: invalid", both)
    assert view.summary(judged(rows(200), rows(200, valid=False))).startswith("the answers changed: invalid")


@pytest.mark.parametrize("change", [{"stop": "length"}, {"valid": False}])
def test_what_few_answers_do_is_no_trouble(change):
    """No more of them than chance gives, and what was so before: a fall of the trouble is none either."""
    few = [*rows(200, **change)[:4], *rows(200)[4:]]
    assert judged(rows(200), few)["reasons"] == judged(rows(200, **change), rows(200))["reasons"] == []
    assert judged(rows(200, **change), rows(200, **change))["reasons"] == []


def test_one_answer_that_is_much_longer_is_no_other_mean_length():
    """The mean moves by 15 %, and not significantly."""
    assert judged(rows(200), [answered(rows(1)[0], length=620), *rows(200)[1:]])["reasons"] == []


def test_a_length_within_a_tenth_is_no_trouble():
    assert judged(rows(200), rows(200, length=21))["verdict"] == "pass"


def test_lengths_that_are_not_known_are_not_judged():
    assert judged(rows(200), [answered(rows(1)[0], length=None), *rows(200, length=30)[1:]])["verdict"] == "pass"
    result = judged(rows(200), rows(200, length=None))
    assert (result["verdict"], result["lengths"]["baseline"]) == ("pass", None)
    assert ("mean length, tokens", "", "", "not told by a server") in view.facts(result)


def test_the_gold_answers_shift_though_no_answer_does():
    result = judged(rows(200), rows(200, loglikelihood=-1.01))
    assert result["verdict"] == "pass"
    found, mean = result["gold_loglikelihood"], sum(i % 7 for i in range(200)) / 200
    assert found["difference"] == found["interval"][0] == found["interval"][1] == pytest.approx(-0.01)
    assert found["largest"] == pytest.approx(0.01) and found["p"] < 1e-9 and found["not_finite"] == 0
    assert found["per_token"] == pytest.approx(-0.005)  # of two tokens each
    assert found["baseline"] == pytest.approx(-1.0 - mean / 1000)


def test_a_gold_answer_that_is_not_finite_is_counted_and_not_averaged():
    candidate = rows(200)
    candidate[5] = replace(candidate[5], answer=replace(candidate[5].answer, gold=gold(math.nan)))
    found = judged(rows(200), candidate)["gold_loglikelihood"]
    assert found["not_finite"] == 1
    assert found["difference"] == pytest.approx(0)


def test_without_gold_answers_on_one_side_there_is_no_shift():
    bare = [replace(row, answer=replace(row.answer, gold=None)) for row in rows(200)]
    assert judged(rows(200), bare)["gold_loglikelihood"] is None


def test_flips_of_the_greedy_token_are_counted():
    candidate = [replace(row, answer=replace(row.answer, gold=gold(-1.0, greedy=(1, 9)))) for row in rows(50)]
    flips = judged(rows(50), candidate)["flips"]
    assert (flips["tokens"], flips["of_tokens"]) == (50, 100)


def test_the_divergence_is_never_more_than_the_whole_one():
    from moe_harness.harness.gate.judging import _kl

    p, q = {1: 0.7, 2: 0.2, 3: 0.06, 4: 0.04}, {1: 0.5, 2: 0.1, 3: 0.1, 4: 0.3}
    whole = sum(p[t] * math.log(p[t] / q[t]) for t in p)
    kept = _kl([(t, math.log(p[t])) for t in (1, 2)], [(t, math.log(q[t])) for t in (1, 4)])
    assert kept == pytest.approx(0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5))  # of 1, and of all the others
    assert 0 < kept <= whole
    every = _kl([(t, math.log(p[t])) for t in p], [(t, math.log(q[t])) for t in p])
    assert every == pytest.approx(whole)
    assert _kl([(1, -0.1)], [(2, -0.1)]) is None


@pytest.mark.parametrize("wrong", [(), range(20), range(3)])
def test_a_result_is_told_in_words_and_as_a_page(tmp_path, wrong):
    from rich.console import Console

    result = judged(rows(100), rows(100, wrong=wrong))
    console = Console(record=True, width=140)
    view.show(result, console)
    text = console.export_text()
    assert result["verdict"].upper() in text and "gold log-likelihood" in text
    view.write_html(result, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "new against trusted" in page and ("wrong" in page) == bool(wrong)
