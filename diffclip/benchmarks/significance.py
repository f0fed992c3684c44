"""Is the difference between two models more than chance? Paired tests over stored outcomes, and over seeds.

Outcomes are one number per item (right or wrong, or an episode's accuracy) whose mean is the score.
"""

from collections.abc import Sequence

import numpy as np


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Return (difference of means second - first, lower, upper end of its percentile interval).

    Items are resampled in pairs (Efron and Tibshirani 1993, chapter 13); arrays are (N,) in the same order.
    """
    difference = _paired(second, first)
    # only how often each distinct difference is drawn matters: a handful of counts instead of N draws
    values, counts = np.unique(difference, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(difference), counts / len(difference), size=resamples)
    means = drawn @ values / len(difference)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided p-value of McNemar's exact test (binomial on the items where just one is right).

    Args:
        first, second: (N,) of 0/1 or bool, in the same order.
    """
    from scipy.stats import binomtest

    difference = _paired(second, first)
    if not np.isin(difference, (-1, 0, 1)).all():
        raise ValueError("McNemar's test is for outcomes that are right or wrong")
    better, worse = int((difference == 1).sum()), int((difference == -1).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def over_seeds(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, lower, upper end of its interval by Student's t) of differences, one for each of >= 2 seeds."""
    from scipy.stats import t

    mean = float(np.mean(differences))
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    half = float(t.ppf((1 + level) / 2, len(differences) - 1) * error)
    return mean, mean - half, mean + half


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"outcomes must be of the same items, got shapes {a.shape} and {b.shape}")
    return a.astype(np.float64) - b.astype(np.float64)
