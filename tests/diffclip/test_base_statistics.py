"""Tests and intervals against scipy's own, closed forms, and a bootstrap that draws item by item."""

import math

import numpy as np
import pytest
from scipy import stats

from diffclip.base.statistics import (
    bootstrap_mean,
    detectable,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    percentiles,
    resampled_sums,
)

ERROR = 0.17  # of an end, in standard errors of the mean: 4.5 sigma of the difference of two bootstraps of 10,000


def samples(seed, n=300):
    generator = np.random.default_rng(seed)
    return {
        "right or wrong": (generator.random(n) < 0.3).astype(float),
        "skewed": generator.exponential(2, n),
        "few values": generator.integers(0, 4, n) / 3,
    }


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("kind", samples(0))
def test_the_interval_of_a_mean_is_scipys(kind, level):
    values = samples(1)[kind]
    mean, low, high = bootstrap_mean(values, level=level)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=level, method="percentile", rng=2
    ).confidence_interval
    allowed = ERROR * values.std() / len(values) ** 0.5
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=allowed)


def test_clusters_are_drawn_whole():
    """Against a loop that draws clusters of unlike sizes one by one, and much wider than items drawn alone."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 9, 80)
    clusters = np.repeat([f"image {i}" for i in range(80)], sizes)
    values = (generator.random(80)[np.repeat(np.arange(80), sizes)] + 0.1 * generator.random(len(clusters)) > 0.5) * 1.0
    order = generator.permutation(len(values))
    mean, low, high = bootstrap_mean(values[order], clusters[order])
    groups = [values[clusters == name] for name in np.unique(clusters)]
    drawn = [np.concatenate([groups[i] for i in generator.integers(0, 80, 80)]).mean() for _ in range(4000)]
    wanted = percentiles(np.array(drawn))
    error = np.std(drawn)
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(wanted, abs=0.22 * error)
    alone = bootstrap_mean(values)
    assert high - low > 1.5 * (alone[2] - alone[1])
    assert bootstrap_mean(values, np.arange(len(values))) == pytest.approx(alone, abs=ERROR * values.std() / 15)


def test_sums_of_drawn_rows_have_the_moments_of_the_rows():
    generator = np.random.default_rng(4)
    rows = np.stack([generator.integers(0, 3, 200), generator.integers(1, 6, 200)], 1).astype(float)
    sums = resampled_sums(rows, 12_345)
    assert sums.shape == (12_345, 2)
    covariance = len(rows) * np.cov(rows.T, ddof=0)
    error = np.sqrt(np.diag(covariance) / len(sums))
    assert (np.abs(sums.mean(0) - rows.sum(0)) < 4.5 * error).all()
    assert np.cov(sums.T) == pytest.approx(covariance, rel=0.1, abs=0.1 * covariance.max())
    assert (resampled_sums(rows, 2000, seed=1) == resampled_sums(rows, 2000, seed=1)).all()
    assert (resampled_sums(rows, 2000, seed=1) != resampled_sums(rows, 2000, seed=2)).any()


def test_percentiles_cut_off_alike_at_both_ends():
    assert percentiles(np.arange(1001)) == pytest.approx((25, 975))
    assert percentiles(np.arange(1001), level=0.5) == pytest.approx((250, 750))


def test_a_paired_interval_is_the_normal_one_for_many_items():
    generator = np.random.default_rng(0)
    first = generator.random(4000) < 0.5
    second = np.where(generator.random(4000) < 0.2, ~first, first) | (generator.random(4000) < 0.05)
    difference, low, high = paired_bootstrap(first, second)
    d = second.astype(float) - first
    half = 1.96 * d.std() / 4000**0.5
    assert difference == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.1 * half)
    back = paired_bootstrap(second, first)
    assert back == pytest.approx((-difference, -high, -low), abs=0.1 * half)
    assert paired_bootstrap(first, first) == (0, 0, 0)


@pytest.mark.parametrize("second", [np.zeros(10), np.zeros((20, 1)), np.zeros(0)])
def test_outcomes_of_other_items_are_refused(second):
    for test in (paired_bootstrap, mcnemar):
        with pytest.raises(ValueError, match="same items"):
            test(np.zeros(0) if not len(second) else np.zeros(20), second)


def test_mcnemar_is_the_binomial_test():
    first = np.array([1] * 10 + [0] * 8 + [1] * 30, dtype=bool)
    second = np.array([0] * 2 + [1] * 8 + [1] * 8 + [1] * 30, dtype=bool)
    # 8 better, 2 worse: 2 * P(X <= 2), X ~ Bin(10, 1/2)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(first, first) == 1
    with pytest.raises(ValueError, match="right or wrong"):
        mcnemar(first * 0.5, second * 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_mcnemar_counts_the_items_where_just_one_is_right(seed):
    generator = np.random.default_rng(seed)
    first, second = generator.random((2, generator.integers(5, 200))) < [[0.5], [0.7]]
    better, worse = int((second & ~first).sum()), int((first & ~second).sum())
    tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1)) / 2 ** (better + worse)
    assert mcnemar(first, second) == pytest.approx(min(1, 2 * tail))
    assert mcnemar(second, first) == pytest.approx(mcnemar(first, second))


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_differences_over_seeds_are_judged_by_students_t(seeds, level):
    differences = np.random.default_rng(seeds).normal(1, 2, seeds)
    mean, low, high, p = over_seeds(list(differences), level)
    error = differences.std(ddof=1) / seeds**0.5
    half = stats.t.ppf((1 + level) / 2, seeds - 1) * error
    assert (mean, low, high) == pytest.approx((differences.mean(), mean - half, mean + half))
    assert p == pytest.approx(2 * stats.t.sf(abs(mean) / error, seeds - 1))


def test_two_seeds_by_hand():
    """The mean of 1 and 3 is 2 ± 12.706 (the 97.5 % point of t with one degree of freedom), p = 1 - 2 atan(2) / pi."""
    mean, low, high, p = over_seeds([1, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 12.706, 2 + 12.706), abs=1e-3)
    assert p == pytest.approx(1 - 2 * math.atan(2) / math.pi)


@pytest.mark.parametrize(("count", "degrees"), [(5, 4), (400, 399), (400, None)])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(count, degrees):
    """By simulation of samples whose true mean is what an interval of their spread says could be shown."""
    half = 1.959964 if degrees is None else stats.t.ppf(0.975, degrees)
    truth = detectable(-half / count**0.5, half / count**0.5, degrees)
    draws = np.random.default_rng(0).normal(truth, 1, (20_000, count))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_the_smallest_detectable_difference_does_not_depend_on_where_the_interval_lies():
    assert detectable(-1.96, 1.96) == pytest.approx(2.80, abs=0.01)  # 1.96 + 0.84 standard errors
    assert detectable(2.04, 5.96) == pytest.approx(2.80, abs=0.01)
