"""The statistics of the gate: exact where they claim it, right as often as they claim it, and able to say no."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy import special, stats

from moe_harness.harness.gate.statistics import LEVEL, Paired, Shift, mcnemar, needed, tango, verdict


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (0, 3), (5, 5), (9, 2), (30, 12)])
def test_mcnemar_is_the_sum_of_the_binomial(worse, better):
    n = worse + better
    exact = Fraction(sum(comb(n, i) for i in range(worse, n + 1)), 2**n)
    assert mcnemar(worse, better) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "b", "c"), [(300, 0.03, 0.03), (1319, 0.05, 0.03), (200, 0.1, 0.05), (500, 0.002, 0.002)]
)
def test_each_end_of_the_interval_holds_the_drop_as_often_as_it_says(n, b, c):
    random_numbers, runs = np.random.default_rng(n), 600
    ends = [tango(*random_numbers.multinomial(n, [b, c, 1 - b - c])[:2], n) for _ in range(runs)]
    for held in (sum(low <= b - c for low, _ in ends), sum(high >= b - c for _, high in ends)):
        assert stats.binomtest(held, runs, 1 - LEVEL, alternative="less").pvalue > 0.001


def test_without_a_pair_that_differs_the_limit_is_known():
    z = stats.norm.isf(LEVEL)
    for n in (10, 133, 1319):
        assert tango(0, 0, n)[1] == pytest.approx(z**2 / (n + z**2), rel=1e-4)


def test_no_interval_leaves_what_a_drop_may_be():
    """Where all are lost, or all are won, it ends there; and it always holds the drop itself."""
    assert tango(10, 0, 10)[1] == pytest.approx(1) == -tango(0, 10, 10)[0]
    for worse, better in ((10, 0), (0, 10), (9, 1), (5, 5), (0, 0)):
        low, high = tango(worse, better, 10)
        assert -1 <= low < high <= 1 and low - 1e-9 <= (worse - better) / 10 <= high + 1e-9


def test_the_interval_is_that_of_the_turned_comparison_turned():
    low, high = tango(12, 3, 200)
    assert tango(3, 12, 200) == pytest.approx((-high, -low))


def test_null_comparisons_fail_as_often_as_they_may():
    """Two runs of one implementation that differ in 4 % of the answers by chance: 200 resampled comparisons."""
    random_numbers, fails = np.random.default_rng(0), 0
    for _ in range(200):
        worse, better = random_numbers.multinomial(1319, [0.02, 0.02, 0.96])[:2]
        fails += verdict(Paired(1319, int(worse), int(better)), 0.02) == "fail"
    assert stats.binomtest(fails, 200, LEVEL, alternative="greater").pvalue > 0.05


@pytest.mark.parametrize(("drop", "discordant", "power"), [(0.03, 0.05, 0.9), (0.03, 0.10, 0.8), (0.01, 0.02, 0.5)])
def test_a_fall_is_found_as_often_as_the_facts_say(drop, discordant, power):
    random_numbers = np.random.default_rng(1)
    shares = [(discordant + drop) / 2, (discordant - drop) / 2, 1 - discordant]
    found = [mcnemar(*map(int, random_numbers.multinomial(1319, shares)[:2])) < LEVEL for _ in range(200)]
    assert np.mean(found) > power


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [((1319, 30, 28), "pass"), ((1319, 60, 20), "fail"), ((50, 0, 0), "inconclusive"), ((200, 12, 4), "fail"),
     ((100, 3, 1), "inconclusive"), ((1319, 0, 40), "pass")],
)  # fmt: skip
def test_verdicts(counts, wanted):
    assert verdict(Paired(*counts), 0.02) == wanted


def test_not_significant_is_not_a_pass():
    assert Paired(100, 4, 1).p > LEVEL
    assert verdict(Paired(100, 4, 1), 0.02) == "inconclusive"


@pytest.mark.parametrize("counts", [(50, 0, 0), (100, 3, 1), (64, 2, 2), (200, 5, 3)])
def test_so_many_questions_decide_and_fewer_do_not(counts):
    many = needed(Paired(*counts), 0.02)
    assert many > counts[0]
    for n, decided in ((many, True), (many - 1, False)):
        worse, better = counts[1] * n / counts[0], counts[2] * n / counts[0]
        sure = worse > 0 and special.betainc(worse, better + 1, 0.5) < LEVEL
        assert (sure or tango(worse, better, n)[1] < 0.02) == decided


def test_a_shift_is_told_from_noise():
    noise = np.random.default_rng(2).normal(0, 1, 400)
    low, high = Shift.of(list(noise)).interval
    assert low < 0 < high
    assert Shift.of(list(noise - 0.3)).interval[1] < 0
    assert Shift.of([]) is None


def test_one_question_that_suffers_much_does_not_hide_that_all_suffer():
    differences = [-0.001 * (1 + i % 5) for i in range(23)] + [-60.0]
    shift = Shift.of(differences)
    assert shift.interval[1] > 0
    assert shift.p < 1e-4
    assert Shift.of([0.0] * 24).p == 1.0
    assert Shift.of([-x for x in differences]).p > 0.99
