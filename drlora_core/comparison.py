"""Comparing two allocations: pure measures of rank arrays, and `compare` of two replays.

Shapes: N experts of a layer, K events. Ranks are int64 [N].
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError
from drlora_core.replay import Replay


def overlap(one: IntArray, two: IntArray) -> float:
    """Share of rank units that both allocations gave to the same experts, 0 to 1.

    sum_i min(a_i, b_i) / max(sum a, sum b).

    Example:
        >>> overlap(np.array([4, 1, 1]), np.array([1, 1, 4]))
        0.5
    """
    return float(np.minimum(one, two).sum() / max(one.sum(), two.sum()))


def average_ranks(values: ArrayLike) -> FloatArray:
    """Position of each value in ascending order, from 1, equal values sharing their mean.

    Example:
        >>> average_ranks([10, 30, 10]).tolist()
        [1.5, 3.0, 1.5]
    """
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    positions: FloatArray = (ends - (counts - 1) / 2.0)[inverse]
    return positions


def spearman(one: ArrayLike, two: ArrayLike) -> float:
    """Spearman's rank correlation; NaN where one side is constant.

    Example:
        >>> spearman([1, 2, 3], [10, 40, 90])
        1.0
    """
    left, right = average_ranks(one), average_ranks(two)
    left, right = left - left.mean(), right - right.mean()
    norm = np.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / norm) if norm > 0.0 else float("nan")


def kendall(one: ArrayLike, two: ArrayLike) -> float:
    """Kendall's tau-b, which corrects for ties; NaN where one side is constant.

    Example:
        >>> kendall([1, 2, 3], [1, 3, 2])
        0.3333333333333333
    """
    left = np.sign(np.subtract.outer(np.asarray(one), np.asarray(one)))
    right = np.sign(np.subtract.outer(np.asarray(two), np.asarray(two)))
    norm = np.sqrt(float((left**2).sum()) * float((right**2).sum()))
    return float((left * right).sum() / norm) if norm > 0.0 else float("nan")


def total_variation(one: ArrayLike, two: ArrayLike) -> float:
    """Half the L1 distance of two distributions, 0 to 1; the inputs are normalised.

    Example:
        >>> total_variation([2, 0], [1, 1])
        0.5
    """
    left, right = np.asarray(one, dtype=np.float64), np.asarray(two, dtype=np.float64)
    return float(np.abs(left / left.sum() - right / right.sum()).sum() / 2.0)


def gini(values: ArrayLike) -> float:
    """Gini coefficient: 0 where all are equal, towards 1 where one has everything.

    Example:
        >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 4])
        (0.0, 0.75)
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    total = ordered.sum()
    if total <= 0.0:
        return 0.0
    size = ordered.size
    weights = 2.0 * np.arange(1, size + 1) - size - 1
    return float((weights * ordered).sum() / (size * total))


def entropy(values: ArrayLike) -> float:
    """Shannon entropy of the normalised values over its maximum, log N: 1 where all are equal.

    Example:
        >>> entropy([1, 1]), entropy([3, 0])
        (1.0, 0.0)
    """
    counts = np.asarray(values, dtype=np.float64)
    if counts.size == 1 or counts.sum() <= 0.0:
        return 1.0
    shares = counts[counts > 0.0] / counts.sum()
    return abs(float(-(shares * np.log(shares)).sum() / np.log(counts.size)))


def churn(deltas: ArrayLike) -> float:
    """Mean total variation between what successive events gave, [K, N]; NaN with fewer than two.

    0: every event serves the same experts alike; 1: no expert is served at two events in a row.

    Example:
        >>> churn([[1, 0], [0, 1], [0, 1]])
        0.5
    """
    rows = np.abs(np.asarray(deltas, dtype=np.float64))
    rows = rows[rows.sum(axis=1) > 0]
    if rows.shape[0] < 2:
        return float("nan")
    return float(np.mean([total_variation(one, two) for one, two in itertools.pairwise(rows)]))


@dataclasses.dataclass(frozen=True, slots=True)
class LayerComparison:
    """Two allocations of one layer; ``a`` and ``b`` are the replays compared."""

    layer: str
    overlap: float
    spearman: float
    kendall: float
    total_variation: float
    gini_a: float
    gini_b: float
    entropy_a: float
    entropy_b: float
    churn_a: float
    churn_b: float
    differing: int
    """Experts whose final ranks differ."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertDifference:
    """An expert whose final ranks differ."""

    layer: str
    expert: int
    rank_a: int
    rank_b: int


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Result of `compare`."""

    layers: tuple[LayerComparison, ...]
    differences: tuple[ExpertDifference, ...]
    """All experts whose final ranks differ, the largest difference first."""

    def mean(self, measure: str) -> float:
        """Mean of a measure of `LayerComparison` over the layers where it is defined."""
        values = np.array([getattr(layer, measure) for layer in self.layers], dtype=np.float64)
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else float("nan")

    def summary(self) -> dict[str, float]:
        """Means over the layers, and the number of experts that differ."""
        fields = [field.name for field in dataclasses.fields(LayerComparison)]
        means = {name: self.mean(name) for name in fields if name not in ("layer", "differing")}
        return means | {"differing": len(self.differences)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"summary": self.summary(), **dataclasses.asdict(self)}


def compare(a: Replay, b: Replay) -> Comparison:
    """Compare the final ranks (and the course) of two replays of the same layers.

    A replay cannot know how the statistics would have changed under other ranks, so this compares
    decisions, not outcomes.

    Raises:
        LayoutError: the replays are of different layers.
    """
    if a.layers != b.layers:
        raise LayoutError(
            f"the replays are of different layers: {list(a.layers.items())[:3]} ... and "
            f"{list(b.layers.items())[:3]} ..."
        )
    layers = tuple(_compare_layer(a, b, name) for name in a.layers)
    differences = [
        ExpertDifference(name, int(expert), int(a.final_ranks[name][expert]), int(rank))
        for name in a.layers
        for expert, rank in enumerate(b.final_ranks[name])
        if rank != a.final_ranks[name][expert]
    ]
    differences.sort(key=lambda found: -abs(found.rank_a - found.rank_b))
    return Comparison(layers, tuple(differences))


def _compare_layer(a: Replay, b: Replay, name: str) -> LayerComparison:
    one, two = a.final_ranks[name], b.final_ranks[name]
    return LayerComparison(
        layer=name,
        overlap=overlap(one, two),
        spearman=spearman(one, two),
        kendall=kendall(one, two),
        total_variation=total_variation(one, two),
        gini_a=gini(one),
        gini_b=gini(two),
        entropy_a=entropy(one),
        entropy_b=entropy(two),
        churn_a=churn(np.diff(a.trajectory(name), axis=0)),
        churn_b=churn(np.diff(b.trajectory(name), axis=0)),
        differing=int((one != two).sum()),
    )
