"""Medians, intervals and tests, each against what theory or another library says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hasten.errors import HastenError
from hasten.measure.stats import (
    bootstrap_interval,
    exp_weighted_mean,
    goodness_of_fit,
    iqr,
    median,
    median_coverage,
    median_interval,
    proportion,
    recovery,
    recovery_of_shares,
    two_sample_test,
)


def test_median_and_quartiles() -> None:
    assert median([3, 1, 2]) == 2
    assert iqr([1, 2, 3, 4, 5]) == (2, 4)
    with pytest.raises(ValueError, match="non-empty"):
        median([])


def test_five_values_cannot_say_more_than_their_range() -> None:
    assert median_interval([5, 1, 4, 2, 3]) == (1, 5)
    assert median_coverage(5) == pytest.approx(0.9375)
    assert median_coverage(4) == pytest.approx(0.875)
    assert median_coverage(9) == 0.95
    assert median_interval([7.0]) is None


def test_the_median_interval_covers() -> None:
    rng = np.random.default_rng(0)
    for num_values in (6, 9, 15):
        hits = 0
        for trial in range(60):
            low, high = median_interval(rng.standard_t(3, num_values), seed=trial) or (1, -1)
            hits += low <= 0 <= high
        assert hits >= 52, f"{hits} of 60 with {num_values} values"


def test_bootstrap_is_seeded_and_shrinks_with_more_units() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=8), rng.normal(size=200)
    mean = lambda rows: float(rows.mean())  # noqa: E731
    assert bootstrap_interval(few, mean, seed=3) == bootstrap_interval(few, mean, seed=3)
    assert bootstrap_interval(few, mean, seed=3) != bootstrap_interval(few, mean, seed=4)
    low, high = bootstrap_interval(many, mean) or (0, 0)
    assert 0.2 < high - low < 0.4  # theory: 2 * 1.96 / sqrt(200) = 0.28
    assert bootstrap_interval([1.0], mean) is None


def test_bootstrap_of_few_units_is_wide() -> None:
    """The expanded percentiles follow Student's t: three units give the whole range."""
    low, high = bootstrap_interval([1.0, 2.0, 6.0], lambda rows: float(rows.mean())) or (0, 0)
    assert (low, high) == (1.0, 6.0)


def test_recovery_of_perplexity_is_original_over_candidate() -> None:
    original, tokens = np.array([1.0, 2.0, 1.5, 2.5]), np.array([100, 50, 80, 20])
    found = recovery(
        original + 0.1,
        original,
        higher_is_better=False,
        weights=tokens,
        aggregate=exp_weighted_mean,
    )
    assert found is not None and found.interval is not None
    assert found.value == pytest.approx(math.exp(-0.1))
    assert found.interval == pytest.approx((math.exp(-0.1), math.exp(-0.1)))
    same = recovery(original, original, higher_is_better=False, aggregate=exp_weighted_mean)
    assert same is not None and (same.value, same.interval) == (1.0, (1.0, 1.0))


def test_recovery_is_paired() -> None:
    """Units that differ a lot among each other but little in their pairs give a narrow interval."""
    rng = np.random.default_rng(2)
    original = rng.gamma(2, 10, size=30)
    candidate = original * rng.normal(0.95, 0.01, size=30)
    found = recovery(candidate, original, higher_is_better=True)
    assert found is not None and found.interval is not None
    low, high = found.interval
    assert low < found.value < high
    assert high - low < 0.02
    with pytest.raises(ValueError, match="one length"):
        recovery([1.0], [1.0, 2.0], higher_is_better=True)


def test_recovery_without_anything_to_recover() -> None:
    assert recovery([1.0, 2.0], [0.0, 0.0], higher_is_better=True) is None
    assert recovery_of_shares([True, False], [False, False]) is None


def test_shares_that_all_agree_are_not_certain() -> None:
    found = recovery_of_shares([True] * 8, [True] * 8)
    assert found is not None and found.interval is not None
    low, high = found.interval
    assert found.value == 1.0
    assert low < 0.9 and high > 1.05
    more = recovery_of_shares([True] * 400, [True] * 400)
    assert more is not None and more.low is not None and more.low > 0.98
    half = recovery_of_shares([True, False] * 20, [True] * 40)
    assert half is not None and half.high is not None
    assert half.value == 0.5 and half.high < 0.75


def test_proportion_is_wilsons() -> None:
    found = proportion(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    full = proportion(10, 10)
    assert full.value == 1.0 and full.low is not None and full.low < 0.75
    with pytest.raises(ValueError, match="not a share"):
        proportion(3, 2)


def test_chi_square_is_textbook() -> None:
    found = two_sample_test([100, 50], [60, 90])
    assert found.statistic == pytest.approx(21.428571)
    assert found.p_value == pytest.approx(3.672575e-06)
    assert found.degrees_of_freedom == 1
    assert found.total_variation == pytest.approx(4 / 15)


def test_the_two_sample_test_accepts_equal_and_rejects_different() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(12, 0.5))
    other = rng.dirichlet(np.full(12, 0.5))
    values = []
    for _ in range(400):
        equal = two_sample_test(rng.multinomial(400, shares), rng.multinomial(300, shares))
        values.append(equal.p_value)
        assert equal.passes()
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.08  # it is calibrated, too
    assert not two_sample_test(rng.multinomial(400, shares), rng.multinomial(400, other)).passes()


def test_a_small_bias_is_found_with_enough_draws() -> None:
    """Greedy acceptance in place of rejection sampling shifts 5 % of the mass: it must show."""
    rng = np.random.default_rng(0)
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    biased = shares + np.array([0.05, -0.02, -0.02, -0.01])
    counts = rng.multinomial(20_000, biased)
    assert not two_sample_test(rng.multinomial(20_000, shares), counts).passes()
    assert not goodness_of_fit(counts, shares).passes()
    assert goodness_of_fit(rng.multinomial(20_000, shares), shares).passes()


def test_rare_outcomes_are_pooled() -> None:
    found = two_sample_test([50, 40, 1, 0, 2, 1, 0, 3], [45, 44, 0, 2, 1, 1, 3, 0])
    assert found.num_cells == 3
    with pytest.raises(HastenError, match="too few draws"):
        two_sample_test([1, 1, 0], [0, 1, 1])
    with pytest.raises(HastenError, match="at least one draw"):
        two_sample_test([0, 0], [1, 1])


def test_a_single_possible_outcome_cannot_differ() -> None:
    assert two_sample_test([10, 0], [20, 0]).p_value == 1.0


def test_an_impossible_outcome_is_rejected() -> None:
    assert goodness_of_fit([99, 1], [1.0, 0.0]).p_value == 0.0
    assert goodness_of_fit([100, 0], [1.0, 0.0]).passes()
    with pytest.raises(ValueError, match="sum to 1"):
        goodness_of_fit([1, 1], [0.2, 0.2])
    with pytest.raises(ValueError, match="whole"):
        two_sample_test([1.5, 2], [1, 2])  # type: ignore[list-item]
