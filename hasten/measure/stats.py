"""Medians, intervals and tests: what may be said of a handful of noisy numbers.

All resampling is seeded, so that the same samples always give the same interval. Intervals are 95 %
unless `level` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hasten.errors import HastenError

LEVEL = 0.95
RESAMPLES = 2000

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` and `high` are None where too little is known for one."""

    value: float
    low: float | None
    high: float | None
    num_units: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def median(values: ArrayLike) -> float:
    """The middle value. Raises ValueError for an empty input."""
    return float(np.median(_numbers(values)))


def iqr(values: ArrayLike) -> tuple[float, float]:
    """The first and third quartile, interpolated linearly."""
    low, high = np.quantile(_numbers(values), [0.25, 0.75])
    return float(low), float(high)


def bootstrap_interval(
    units: ArrayLike,
    statistic: Statistic,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of `statistic(units)` over resamplings of the units.

    `units` has shape (num_units, ...): everything that belongs to one unit (both sides of a pair)
    stands in one row and is drawn together. Percentile method, with the percentiles moved outwards
    for few units ("expanded percentile", Hesterberg 2015), because the plain one is too narrow
    below about 50 units. Returns None where no interval can be had: fewer than two units, or a
    statistic that is undefined (NaN) in more than one side's share of the resamples.
    """
    data = np.asarray(units, dtype=np.float64)
    if data.ndim == 0 or data.shape[0] == 0:
        raise ValueError("at least one unit is needed")
    if data.shape[0] < 2:
        return None
    drawn = [statistic(data[draw]) for draw in _draws(data.shape[0], resamples, seed)]
    return _percentiles(np.array(drawn), data.shape[0], level)


def median_interval(
    values: ArrayLike, *, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of the median: the bootstrap's, widened to the exact one where that is wider.

    The exact one runs between two order statistics (the sign test's interval) and assumes no
    shape of the noise. It covers at least `level`, except where even the whole range cannot:
    five values cover 93.75 %, four 87.5 %, three 75 %. One value has no interval.
    """
    data = np.sort(_numbers(values))
    num = len(data)
    if num < 2:
        return None
    drawn = np.median(data[_draws(num, RESAMPLES, seed)], axis=1)
    interval = _percentiles(drawn, num, level)
    assert interval is not None  # a median is never undefined
    # Largest k with P(fewer than k of num values lie below the median) <= (1 - level) / 2.
    outside, trim = 0.0, 0
    for k in range(num // 2):
        outside += math.comb(num, k) / 2**num
        if outside > (1 - level) / 2:
            break
        trim = k
    return min(interval[0], float(data[trim])), max(interval[1], float(data[num - 1 - trim]))


def median_coverage(num_values: int, *, level: float = LEVEL) -> float:
    """Probability with which `median_interval` of so many values covers the true median."""
    whole_range = 1 - 2 * 0.5**num_values if num_values > 1 else 0.0
    return min(level, whole_range)


def weighted_mean(values: Array, weights: Array) -> float:
    """Mean of per-unit values, weighted by the unit's size."""
    return float(np.average(values, weights=weights))


def exp_weighted_mean(values: Array, weights: Array) -> float:
    """Perplexity from mean negative log-likelihoods per unit (nats) and token counts."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.average(values, weights=weights)))


def recovery(
    candidate: ArrayLike,
    original: ArrayLike,
    *,
    higher_is_better: bool,
    weights: ArrayLike | None = None,
    aggregate: Callable[[Array, Array], float] = weighted_mean,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate | None:
    """How much of the original's quality the candidate keeps; 1.0 means as good.

    Both are per-unit figures (one per prompt or file, same order) of shape (num_units,). They are
    first aggregated over units and then divided: candidate / original where higher is better,
    original / candidate where lower is better. For perplexity give mean nats per unit, token
    counts as `weights` and `exp_weighted_mean`. Units are resampled in pairs.

    Returns None where the original has nothing to recover (a score of zero). Yes/no figures belong
    to `recovery_of_shares`, whose interval does not shrink to nothing when all units agree.
    """
    ours, theirs = _numbers(candidate), _numbers(original)
    sizes = np.ones_like(ours) if weights is None else _numbers(weights)
    if not ours.shape == theirs.shape == sizes.shape:
        raise ValueError(
            f"paired figures must have one length: candidate {len(ours)}, original {len(theirs)}, "
            f"weights {len(sizes)}"
        )

    def ratio(units: Array) -> float:
        new, old = aggregate(units[:, 0], units[:, 2]), aggregate(units[:, 1], units[:, 2])
        return _quotient(new, old) if higher_is_better else _quotient(old, new)

    units = np.stack([ours, theirs, sizes], axis=1)
    value = ratio(units)
    if not math.isfinite(value):
        return None
    low, high = bootstrap_interval(units, ratio, level=level, seed=seed) or (None, None)
    return Estimate(value, low, high, len(units))


def recovery_of_shares(
    candidate: Sequence[bool] | NDArray[np.bool_],
    original: Sequence[bool] | NDArray[np.bool_],
    *,
    level: float = LEVEL,
    seed: int = 0,
    draws: int = 20_000,
) -> Estimate | None:
    """Recovery of a share of yes/no units (parses, retrieved), paired by unit; higher is better.

    A bootstrap of eight times "yes, yes" says 1.0 with certainty. Here the four outcomes of a pair
    get Jeffreys' prior (half a unit each), and the interval is that of the posterior: eight out of
    eight stays uncertain, as it is. Returns None where the original never succeeds.
    """
    ours, theirs = np.asarray(candidate, dtype=bool), np.asarray(original, dtype=bool)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"paired answers must have one length: {ours.shape} and {theirs.shape}")
    if not theirs.any():
        return None
    cells = np.array(
        [(ours & theirs).sum(), (ours & ~theirs).sum(), (~ours & theirs).sum()], dtype=np.float64
    )
    neither = len(ours) - cells.sum()
    posterior = np.random.default_rng(seed).dirichlet([*(cells + 0.5), neither + 0.5], size=draws)
    ratios = (posterior[:, 0] + posterior[:, 1]) / (posterior[:, 0] + posterior[:, 2])
    value = float(ours.sum() / theirs.sum())
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), len(ours))


def proportion(successes: int, trials: int, *, level: float = LEVEL) -> Estimate:
    """A share with Wilson's interval, which stays inside [0, 1] and never has zero width."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is not a share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    variance = share * (1 - share) / trials + z * z / (4 * trials * trials)
    reach = z / (1 + z * z / trials) * math.sqrt(variance)
    return Estimate(share, max(0.0, centre - reach), min(1.0, centre + reach), trials)


@dataclass(frozen=True)
class Test:
    """A test of "these come from one distribution"; a small `p_value` speaks against it."""

    p_value: float
    statistic: float
    degrees_of_freedom: int
    num_cells: int  # after pooling of rare outcomes
    total_variation: float  # half the summed differences of the shares, before pooling

    __test__ = False  # keeps pytest from collecting it

    def passes(self, significance: float = 0.001) -> bool:
        """True where the difference is no larger than chance makes it.

        The default is strict on purpose: a suite that runs hundreds of these must not fail one in
        twenty by chance.
        """
        return self.p_value >= significance


def two_sample_test(
    counts_a: Sequence[int] | NDArray[np.int64],
    counts_b: Sequence[int] | NDArray[np.int64],
    *,
    min_expected: float = 5.0,
) -> Test:
    """Pearson's chi-square test that two count vectors (num_outcomes,) share one distribution.

    Outcomes with fewer than `min_expected` expected counts in either sample are pooled, rarest
    first, since the chi-square law does not hold for them. Raises HastenError where the samples
    are so small that nothing remains to compare.
    """
    table = np.stack([_counts(counts_a), _counts(counts_b)])
    totals = table.sum(axis=1)
    if (totals == 0).any():
        raise HastenError("both samples need at least one draw")
    shares = table / totals[:, None]
    smaller = totals.min() / totals.sum()
    pooled = _pool(table, table.sum(axis=0) * smaller, min_expected)
    expected = totals[:, None] * pooled.sum(axis=0) / totals.sum()
    return _chi_square(pooled, expected, float(np.abs(shares[0] - shares[1]).sum() / 2))


def goodness_of_fit(
    counts: Sequence[int] | NDArray[np.int64],
    probabilities: ArrayLike,
    *,
    min_expected: float = 5.0,
) -> Test:
    """Pearson's chi-square test that counts (num_outcomes,) come from known probabilities.

    An outcome that was seen although its probability is zero gives a p value of 0. Stronger than
    `two_sample_test` where the true distribution can be computed.
    """
    observed, wanted = _counts(counts), _numbers(probabilities)
    if observed.shape != wanted.shape:
        raise ValueError(f"{len(observed)} counts for {len(wanted)} probabilities")
    if (wanted < 0).any() or not math.isclose(wanted.sum(), 1.0, abs_tol=1e-4):
        raise ValueError("probabilities must be non-negative and sum to 1")
    total = observed.sum()
    if total == 0:
        raise HastenError("the sample needs at least one draw")
    wanted = wanted / wanted.sum()
    distance = float(np.abs(observed / total - wanted).sum() / 2)
    if (observed[wanted == 0] > 0).any():
        return Test(0.0, math.inf, 0, int((wanted > 0).sum()), distance)
    both = np.stack([observed, wanted * total])
    pooled = _pool(both, wanted * total, min_expected)
    return _chi_square(pooled[:1], pooled[1:], distance)


def _chi_square(observed: Array, expected: Array, distance: float) -> Test:
    """Test of an observed table (num_samples, num_cells); rows beyond the first cost no freedom."""
    freedom = observed.shape[1] - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    if freedom == 0:  # a single outcome that is possible: nothing can differ
        return Test(1.0, 0.0, 0, 1, distance)
    tail = torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64),
        torch.tensor(statistic / 2, dtype=torch.float64),
    )
    return Test(float(tail), statistic, freedom, observed.shape[1], distance)


def _pool(table: Array, expected: Array, min_expected: float) -> Array:
    """Add up rare columns until each column left expects enough. Impossible ones are dropped."""
    possible = (expected > 0) | (table.sum(axis=0) > 0)
    table, expected = table[:, possible], expected[possible]
    if table.shape[1] == 1:
        return table
    order = np.argsort(expected, kind="stable")
    table, expected = table[:, order], expected[order]
    rare = int((expected < min_expected).sum())
    # The pool itself may still be too small; then it takes in the next outcome as well.
    while 0 < rare < len(expected) and expected[:rare].sum() < min_expected:
        rare += 1
    if rare:
        pool = table[:, :rare].sum(axis=1, keepdims=True)
        table = np.concatenate([pool, table[:, rare:]], axis=1)
    if table.shape[1] < 2:
        raise HastenError(
            f"too few draws to tell: all outcomes expect fewer than {min_expected:g} counts; "
            "draw more samples"
        )
    return table


def _quotient(top: float, bottom: float) -> float:
    if bottom == 0:
        return 1.0 if top == 0 else math.nan
    return top / bottom


def _draws(num_units: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Which units each resample takes, shape (resamples, num_units)."""
    return np.random.default_rng(seed).integers(0, num_units, size=(resamples, num_units))


def _percentiles(drawn: Array, num_units: int, level: float) -> tuple[float, float] | None:
    """The interval of resampled figures; None where too many of them are undefined."""
    undefined = np.isnan(drawn)
    if undefined.mean() > (1 - level) / 2:
        return None
    tail = _expanded_tail(num_units, level)
    low, high = np.quantile(drawn[~undefined], [tail, 1 - tail])
    return float(low), float(high)


def _expanded_tail(num_units: int, level: float) -> float:
    """Share of resamples cut off at each end, smaller than (1 - level) / 2 for few units."""
    t = _student_quantile((1 + level) / 2, num_units - 1)
    return NormalDist().cdf(-math.sqrt(num_units / (num_units - 1)) * t)


def _student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t for p > 0.5, by bisection of its closed form."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        if _student_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term, total = cosine, cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return (1 + inside) / 2


def _numbers(values: ArrayLike) -> Array:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"a non-empty list of numbers is needed, not shape {data.shape}")
    return data


def _counts(values: Sequence[int] | NDArray[np.int64]) -> Array:
    data = _numbers(values)
    if (data < 0).any() or (data != np.floor(data)).any():
        raise ValueError("counts must be whole and not negative")
    return data
