"""The statistics of the book, against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from teleport_lite.book.evidence import best_rate, compare, fieller, holm, noncentrality, paired
from teleport_lite.errors import ShapeError

RNG = np.random.default_rng(0)


def test_the_paired_effect_is_that_of_a_paired_t_test():
    a, b = RNG.normal(size=(2, 7))
    found, oracle = paired(a, b), stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.95)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-10)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-10)
    assert found.clear == 0 and paired(a + 10, b).clear == 1 and paired(a - 10, b).clear == -1


def test_a_difference_at_the_limit_is_found_in_four_of_five_repetitions():
    n, error = 5, 1 / math.sqrt(5)
    draws = RNG.normal(noncentrality(n) * error, 1, size=(20000, n))
    found = stats.ttest_1samp(draws, 0, axis=1)
    shown = ((found.pvalue < 0.05) & (found.statistic > 0)).mean()
    assert shown == pytest.approx(0.8, abs=0.012)  # four standard errors of a share of 20000


def test_training_that_failed_gives_no_interval():
    found = paired([0.1, math.inf], [0.1, 0.2])
    assert found.p == 1 and found.half == math.inf and found.clear == 0


def test_identical_arms_do_not_differ():
    assert paired([0.1, 0.2], [0.1, 0.2])[:3] == (0, 0, 1)


@pytest.mark.parametrize(("arm", "base"), [([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0]), ([[1.0, 2.0]], 0.0)])
def test_unpaired_numbers_are_refused(arm, base):
    with pytest.raises(ShapeError):
        paired(arm, base)


def test_holm_rejects_as_the_step_down_procedure_does():
    for _ in range(50):
        p = RNG.uniform(size=6) ** 3
        rejected, left = set(), sorted(range(6), key=lambda i: p[i])
        while left and p[left[0]] <= 0.05 / len(left):
            rejected.add(left.pop(0))
        assert {i for i, q in enumerate(holm(p)) if q <= 0.05} == rejected


def test_a_best_rate_at_an_edge_is_flagged():
    assert best_rate([[3, 2, 1]]) == (2, True) and best_rate([[1, 2, 3]]) == (0, True)
    assert best_rate([[3, 1, math.inf]]) == (1, False)
    assert best_rate([[3, 1, 5], [3, 1, 2]], ceiling=3) == (1, True), "no other rate trains"


def test_an_arm_against_a_base():
    base = RNG.uniform(0.2, 0.4, size=(5, 4))
    arm = base - 0.1
    arm[2, 3] = math.inf
    found = compare(arm, base, arm_validation=[[3, 1, 2, 9]] * 5, base_validation=[[3, 2, 1, 9]] * 5)
    assert found.at_best == paired(arm[:, 1], base[:, 2])
    assert found.over_rates.mean == pytest.approx(-0.1) and found.rates == 3
    base[:, 3] = math.inf  # both fail: no number, and no warning
    assert compare(arm, base, arm_validation=arm, base_validation=base).rates == 3
    assert not compare(arm, base, arm_validation=base, base_validation=base, ceiling=0).rates
    with pytest.raises(ShapeError):
        compare(arm, base[:, 1:], arm_validation=base, base_validation=base)


def test_fieller_covers_the_ratio_as_often_as_it_says():
    hits = 0
    for _ in range(4000):
        y = RNG.normal(1.0, 0.5, size=5)
        x = 0.8 * y + RNG.normal(0, 0.3, size=5)
        _, low, high = fieller(x, y)
        hits += low <= 0.8 <= high
    assert hits / 4000 == pytest.approx(0.95, abs=0.014)  # four standard errors


def test_fieller_is_the_set_of_ratios_that_a_t_test_keeps():
    x, y = RNG.normal(2, 0.3, size=6), RNG.normal(1, 0.1, size=6)
    ratio, low, high = fieller(x, y)
    assert low < ratio < high
    for r in (low, high):
        assert stats.ttest_1samp(x - r * y, 0).pvalue == pytest.approx(0.05, rel=1e-6)
    assert fieller(x, y - 1)[1:] == (-math.inf, math.inf)
