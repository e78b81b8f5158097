"""Statistics of paired comparisons and of rankings; pure functions over arrays.

Runs are paired by seed: under one seed every method meets the same batches in the same order, so
differences are taken seed by seed. A *group* is the array of such differences of one task [seeds];
groups count equally, however many seeds they have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
EXACT_UP_TO = 14
"""Values up to which all sign flips are enumerated (2^14)."""
FEWEST, FEWEST_IN_A_GROUP = 5, 3
"""With less, no interval: a bootstrap interval stays within the range of its values, and that of
four normal values holds their mean in 7 cases of 8 only."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; infinite ends where there are too few values for one."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def side(self) -> int:
        """-1 or 1 where the whole interval lies below or above 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def estimate(groups: Sequence[np.ndarray], *, seed: int = 0) -> Estimate:
    """Mean of the groups' means, with a 95 % bootstrap interval; seeds are resampled in each group.

    The plain percentile interval is too narrow for few values. This is the expanded percentile
    interval (Hesterberg, The American Statistician 69, 2015, section 4.3.3): its quantiles are
    chosen so that for normal data it is as wide as Student's. Five normal values still come to
    92 % only, for they limit it to their own range.

    Example:
        >>> estimate([np.array([-3.0, -1.0, -2.0, -2.5, -1.5])]).side
        -1
        >>> estimate([np.array([-3.0, -1.0])]).low
        -inf
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group)]
    count = sum(group.size for group in groups)
    mean = float(np.mean([group.mean() for group in groups])) if groups else math.nan
    if count < FEWEST or min(group.size for group in groups) < FEWEST_IN_A_GROUP:
        return Estimate(mean, -math.inf, math.inf, count)
    generator = np.random.default_rng(seed)
    draws = np.zeros(RESAMPLES)
    for group in groups:
        picks = generator.integers(group.size, size=(RESAMPLES, group.size))
        draws += group[picks].mean(axis=1) / len(groups)
    level = _expanded_level(groups)
    low, high = np.quantile(draws, [level, 1 - level])
    return Estimate(mean, float(low), float(high), count)


def over_groups(groups: Sequence[np.ndarray], *, seed: int = 0) -> Estimate:
    """As ``estimate``, with the group as the unit: an interval for tasks like these, not for these.

    Only the upper level is resampled, which carries the noise of the seeds with it (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
    """
    return estimate([np.array([np.mean(group) for group in groups if len(group)])], seed=seed)


def _expanded_level(groups: Sequence[np.ndarray]) -> float:
    """Return the lower quantile of the bootstrap means that makes the interval Student's."""
    sizes = np.array([group.size for group in groups])
    variances = np.array([group.var(ddof=1) for group in groups]) / sizes
    total = variances.sum()
    if total == 0:
        return 0.025
    degrees = total**2 / (variances**2 / (sizes - 1)).sum()  # Welch and Satterthwaite
    inflation = math.sqrt(total / (variances * (sizes - 1) / sizes).sum())
    return NormalDist().cdf(-inflation * student_quantile(0.975, float(degrees)))


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t, by integration: for t = sqrt(d) tan(a), a's density is cos(a)^(d-1).

    Example:
        >>> round(student_quantile(0.975, 4), 3)
        2.776
    """
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.cos(angle).clip(0) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(probability, below / below[-1], angle)))


def sign_flip_p(groups: Sequence[np.ndarray], *, seed: int = 0) -> float:
    """Two-sided p-value of the mean of the groups' means, were every difference's sign a coin toss.

    Exact for up to 14 values, else from 10,000 random flips. With n values it is at least 2^(1-n).

    Example:
        >>> sign_flip_p([np.array([1.0, 2.0, 3.0])])
        0.25
    """
    groups = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not groups:
        return math.nan
    weighted = np.concatenate([group / (group.size * len(groups)) for group in groups])
    exact = weighted.size <= EXACT_UP_TO
    if exact:
        flips = np.array(list(itertools.product((1, -1), repeat=weighted.size)))
    else:
        flips = np.random.default_rng(seed).choice((-1, 1), size=(RESAMPLES, weighted.size))
    observed = abs(weighted.sum())
    rounding = 1e-12 * np.abs(weighted).sum()
    extreme = int((np.abs(flips @ weighted) >= observed - rounding).sum())
    return extreme / len(flips) if exact else (extreme + 1) / (len(flips) + 1)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank; nan where either is constant.

    Example:
        >>> spearman(np.array([1, 2, 3]), np.array([10, 20, 15]))
        0.5
    """
    a, b = _midranks(x), _midranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def _midranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Agreement of two orders, tau-b: 1 the same, -1 reversed; nan where either is constant.

    Example:
        >>> round(kendall(np.array([1, 2, 3]), np.array([1, 3, 2])), 3)
        0.333
    """
    above = np.triu_indices(len(x), k=1)
    a = np.sign(np.subtract.outer(np.asarray(x, float), np.asarray(x, float)))[above]
    b = np.sign(np.subtract.outer(np.asarray(y, float), np.asarray(y, float)))[above]
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan
