"""Is the difference between two models more than chance? Tests over stored outcomes, and over seeds.

Outcomes are one number per item (right or wrong, or an episode's accuracy) whose mean is the score. Items that stand
or fall together (the questions of one image) are resampled as whole clusters.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.stats import binomtest, ttest_1samp


def resampled_sums(rows: np.ndarray, resamples: int = 10_000, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Sums of rows drawn with replacement, as many as there are: (N, k) -> (resamples, k), for any bootstrap.

    (Efron and Tibshirani 1993, chapter 13; with a cluster's sums as its row it is the cluster bootstrap of Davison and
    Hinkley 1997, section 3.8.)
    """
    # only how often each distinct row is drawn matters: for right and wrong a handful of counts instead of N draws
    values, counts = np.unique(rows, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    sizes = [min(1000, resamples - start) for start in range(0, resamples, 1000)]  # ten thousand images: no gigabyte
    return np.concatenate([generator.multinomial(len(rows), counts / len(rows), n) @ values for n in sizes])


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Lower and upper end of the percentile interval of (resamples,) values."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: np.ndarray, clusters: Sequence | np.ndarray | None = None, *, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, lower, upper end of its percentile interval) of (N,) values.

    `clusters` are (N,) names of what each value belongs to: whole clusters are drawn. None: each is its own.
    """
    names = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    _, index = np.unique(names, return_inverse=True)
    drawn = resampled_sums(np.stack([np.bincount(index, values), np.bincount(index)], 1), resamples)
    return (float(values.mean()), *percentiles(drawn[:, 0] / drawn[:, 1], level))


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """(difference of means second - first, lower, upper end) of two (N,) in the same order, resampled in pairs."""
    return bootstrap_mean(_paired(second, first), resamples=resamples, level=level)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The two-sided p-value of McNemar's exact test (binomial where just one of two is right), of (N,) 0/1 each."""
    difference = _paired(second, first)
    if not np.isin(difference, (-1, 0, 1)).all():
        raise ValueError("McNemar's test is for outcomes that are right or wrong")
    better, worse = int((difference == 1).sum()), int((difference == -1).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def over_seeds(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """(mean, lower, upper end, p) by Student's t of differences, one for each of >= 2 seeds, not all the same."""
    test = ttest_1samp(differences, 0)
    ends = test.confidence_interval(level)
    return float(np.mean(differences)), float(ends.low), float(ends.high), float(test.pvalue)


def detectable(low: float, high: float, degrees: int | None = None, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference that a test would find with this power, from the interval that it gave.

    Args:
        low, high: ends of the difference's interval at `level`.
        degrees: of freedom, where the interval is Student's t; None where it is normal, or a bootstrap's of many items.

    (Bloom 1995, "Minimum detectable effects": the sum of the two quantiles, in standard errors.)
    """
    quantile = stats.norm.ppf if degrees is None else stats.t(degrees).ppf
    critical = quantile((1 + level) / 2)
    return float((high - low) / 2 / critical * (critical + quantile(power)))


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"outcomes must be of the same items, got shapes {a.shape} and {b.shape}")
    return a.astype(np.float64) - b.astype(np.float64)
