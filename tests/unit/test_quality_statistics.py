"""The statistics of the benchmark: intervals, the exact test, the correction."""

import itertools
import math

import pytest
from benchmarks.quality.statistics import holm, sign_flip_p, smallest_p, t_interval


def test_the_t_interval_of_four_numbers_is_the_textbook_one():
    # Mean 2.5, sample variance 5/3, standard error sqrt(5/12) = 0.6455; t(3, 0.975) = 3.1824.
    found = t_interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.low == pytest.approx(2.5 - 3.1824 * 0.645497, abs=1e-4)
    assert found.high == pytest.approx(2.5 + 3.1824 * 0.645497, abs=1e-4)
    assert found.num == 4


def test_one_value_has_a_mean_and_no_interval():
    found = t_interval([0.3])
    assert found.mean == 0.3
    assert math.isnan(found.low)
    assert not found.excludes_zero


def test_no_value_has_no_mean():
    assert math.isnan(t_interval([]).mean)


@pytest.mark.parametrize(
    "differences",
    [[0.3, -0.1, 0.4, 0.2, 0.05], [1.0, -1.0, 2.0], [0.1, 0.2, 0.3, 0.1], [-2.0, -3.0], [0.0, 1.0]],
)
def test_the_sign_flip_p_is_the_share_of_patterns_at_least_as_far_out(differences):
    patterns = list(itertools.product([1, -1], repeat=len(differences)))
    sums = [abs(math.fsum(s * d for s, d in zip(p, differences, strict=True))) for p in patterns]
    found = abs(math.fsum(differences))
    assert sign_flip_p(differences) == sum(s >= found - 1e-9 for s in sums) / len(patterns)


def test_six_differences_of_one_sign_give_two_of_64_patterns():
    assert sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.2, 0.7]) == 2 / 64 == smallest_p(6)


def test_no_difference_at_all_has_p_one():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p([]) == 1.0


def test_a_diverged_run_claims_nothing():
    assert sign_flip_p([0.1] * 9 + [math.nan]) == 1.0


def test_too_many_differences_are_refused():
    with pytest.raises(ValueError, match="at most 20"):
        sign_flip_p([0.1] * 21)


def test_holm_multiplies_the_smallest_most_and_never_falls():
    # Sorted .01, .02, .03, .04: 4 x .01 = .04; 3 x .02 = .06; 2 x .03 = .06; 1 x .04 -> .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_counts_comparisons_that_are_still_missing():
    # Of five listed: 5 x .01 = .05, then 4 x .5, cut at one.
    assert holm([0.5, 0.01], num_comparisons=5) == pytest.approx([1.0, 0.05])
    with pytest.raises(ValueError, match="3 p-values of 2"):
        holm([0.1, 0.1, 0.1], num_comparisons=2)
