"""Statistics of paired comparisons, by scipy.stats.

Runs are paired by seed: with the same seed, every method sees the same batches in the same order,
so we take differences seed by seed. A *group* is the array of these differences for one setting
[seeds]. Groups have equal weight, however many seeds they have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
EXACT_UP_TO = 14
"""Up to this many values, the sign-flip test enumerates all sign patterns (2^14)."""
FEWEST, FEWEST_IN_A_GROUP = 5, 3
"""With fewer values we give no interval. A bootstrap interval stays within the range of its values,
and the range of four normal values contains their mean in only 7 of 8 cases."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; the ends are infinite if there are too few values."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def side(self) -> int:
        """-1 if the whole interval is below 0, 1 if it is above, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def estimate(groups: Sequence[np.ndarray], *, seed: int = 0) -> Estimate:
    """Mean of the group means with a 95 % bootstrap interval, resampling seeds within each group.

    The plain percentile interval is too narrow for few values. This is the expanded percentile
    interval (Hesterberg, The American Statistician 69, 2015, section 4.3.3): its quantiles are
    chosen so that for normal data it is as wide as Student's t interval. With five normal values
    its coverage is still only 92 %, because it cannot leave the range of the values.

    Example:
        >>> estimate([np.array([-3.0, -1.0, -2.0, -2.5, -1.5])]).side
        -1
        >>> estimate([np.array([-3.0, -1.0])]).low
        -inf
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group)]
    count = sum(group.size for group in groups)
    mean = _mean_of_means(*groups) if groups else math.nan
    if count < FEWEST or min(group.size for group in groups) < FEWEST_IN_A_GROUP:
        return Estimate(float(mean), -math.inf, math.inf, count)
    found = stats.bootstrap(
        groups,
        _mean_of_means,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * _expanded_level(groups),
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(float(mean), float(found.low), float(found.high), count)


def _mean_of_means(*groups: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([group.mean(axis=axis) for group in groups], axis=0)


def over_groups(groups: Sequence[np.ndarray], *, seed: int = 0) -> Estimate:
    """Like ``estimate``, but resamples the groups: an interval for settings similar to these.

    Resampling only the groups includes the noise of the seeds (Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, section 3.8).
    """
    return estimate([np.array([np.mean(group) for group in groups if len(group)])], seed=seed)


def _expanded_level(groups: Sequence[np.ndarray]) -> float:
    """Lower quantile of the bootstrap means at which the interval is as wide as Student's."""
    sizes = np.array([group.size for group in groups])
    variances = np.array([group.var(ddof=1) for group in groups]) / sizes
    total = variances.sum()
    if total == 0:
        return 0.025
    degrees = total**2 / (variances**2 / (sizes - 1)).sum()  # Welch and Satterthwaite
    inflation = math.sqrt(total / (variances * (sizes - 1) / sizes).sum())
    return float(stats.norm.cdf(-inflation * stats.t.ppf(0.975, degrees)))


def sign_flip_p(groups: Sequence[np.ndarray], *, seed: int = 0) -> float:
    """Two-sided p-value of the mean of the group means, if the sign of each difference is random.

    Exact for up to 14 values, otherwise from 10,000 random sign patterns. With n values it is at
    least 2^(1 - n).

    Example:
        >>> sign_flip_p([np.array([1.0, 2.0, 3.0])])
        0.25
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not groups:
        return math.nan
    weighted = np.concatenate([group / (group.size * len(groups)) for group in groups])
    if weighted.size == 1:
        return 1.0  # scipy wants at least two values
    scale = np.abs(weighted).max() or 1.0
    found = stats.permutation_test(
        (weighted / scale,),
        lambda values, axis: np.abs(values.sum(axis=axis)).round(12),  # equal sums may round apart
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf if weighted.size <= EXACT_UP_TO else RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; nan if either is constant, where scipy would warn.

    Example:
        >>> spearman(np.array([1, 2, 3]), np.array([10, 20, 15]))
        0.5
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)
