"""Compare two allocations: measures of rank arrays, and `compare` for two replays.

Shapes: N experts of a layer, K events. Ranks are int64 [N]. Rank correlations and the entropy come
from SciPy (extra ``cli``).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, import_extra
from drlora_core.replay import Replay


def overlap(one: IntArray, two: IntArray) -> float:
    """Share of rank units that both allocations give to the same experts, 0 to 1.

    sum_i min(a_i, b_i) / max(sum a, sum b); NaN where neither gives any.

    Example:
        >>> overlap(np.array([4, 1, 1]), np.array([1, 1, 4]))
        0.5
    """
    most = max(one.sum(), two.sum())
    return float(np.minimum(one, two).sum() / most) if most else float("nan")


def chance_overlap(one: IntArray, two: IntArray) -> float:
    """Mean overlap of two allocations over all orders of the experts; NaN where both are empty.

    Example:
        >>> chance_overlap(np.array([3, 1]), np.array([3, 1]))
        0.75
    """
    most = max(one.sum(), two.sum())
    shared = np.minimum.outer(one, two).sum() / one.size
    return float(shared / most) if most else float("nan")


def spearman(one: ArrayLike, two: ArrayLike) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    return _correlation("spearmanr", one, two)


def kendall(one: ArrayLike, two: ArrayLike) -> float:
    """Kendall's tau-b, which corrects for ties; NaN where one side is constant."""
    return _correlation("kendalltau", one, two)


def _correlation(name: str, one: ArrayLike, two: ArrayLike) -> float:
    measure = getattr(import_extra("scipy.stats", "cli"), name)
    if np.ptp(one) == 0 or np.ptp(two) == 0:  # SciPy warns of these
        return float("nan")
    return float(measure(one, two).statistic)


def total_variation(one: ArrayLike, two: ArrayLike) -> float:
    """Half the L1 distance of two distributions, 0 to 1; NaN where one side is all 0.

    The inputs are normalised.
    """
    left, right = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if not (left.any() and right.any()):
        return float("nan")
    return float(np.abs(left / left.sum() - right / right.sum()).sum() / 2.0)


def gini(values: ArrayLike) -> float:
    """Gini coefficient: 0 where all are equal, towards 1 where one has everything.

    Example:
        >>> gini([1, 1, 1, 1]), gini([0, 0, 0, 4])
        (0.0, 0.75)
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    size, total = ordered.size, ordered.sum()
    weights = 2.0 * np.arange(1, size + 1) - size - 1
    return float((weights * ordered).sum() / (size * total)) if total > 0.0 else 0.0


def entropy(values: ArrayLike) -> float:
    """Shannon entropy of the normalised values over its maximum, log N: 1 where all are equal."""
    counts = np.asarray(values, dtype=np.float64)
    if counts.size == 1 or counts.sum() <= 0.0:
        return 1.0
    return float(import_extra("scipy.stats", "cli").entropy(counts, base=counts.size))


def churn(deltas: ArrayLike) -> float:
    """Mean total variation between the growth of successive events, [K, N].

    0: every event serves the same experts alike; 1: no expert is served at two events in a row.
    NaN where fewer than two events place anything.
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
    differing: int  # experts whose final ranks differ


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
    differences: tuple[ExpertDifference, ...]  # the largest difference first

    def mean(self, measure: str) -> float:
        """Mean of a measure of `LayerComparison` over the layers where it is defined."""
        return mean_of_defined([getattr(layer, measure) for layer in self.layers])

    def summary(self) -> dict[str, float]:
        """Means over the layers, and the number of experts that differ."""
        fields = [field.name for field in dataclasses.fields(LayerComparison)]
        means = {name: self.mean(name) for name in fields if name not in ("layer", "differing")}
        return means | {"differing": len(self.differences)}

    def to_dict(self) -> dict[str, Any]:
        return {"summary": self.summary(), **dataclasses.asdict(self)}


def mean_of_defined(values: ArrayLike) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    defined: FloatArray = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if defined.size else float("nan")


def compare(a: Replay, b: Replay) -> Comparison:
    """Compare the final ranks and the events of two replays of the same layers.

    This compares decisions, not outcomes: see `replay`.

    Raises:
        LayoutError: the replays have different layers.
        DRLoRAError: SciPy is not installed.
    """
    if a.layers != b.layers:
        one, two = list(a.layers.items())[:3], list(b.layers.items())[:3]
        raise LayoutError(f"the replays have different layers: {one} ... and {two} ...")
    differences = [
        ExpertDifference(name, int(expert), int(ranks[expert]), int(b.final_ranks[name][expert]))
        for name, ranks in a.final_ranks.items()
        for expert in np.flatnonzero(ranks != b.final_ranks[name])
    ]
    differences.sort(key=lambda found: -abs(found.rank_a - found.rank_b))
    return Comparison(tuple(_compare_layer(a, b, name) for name in a.layers), tuple(differences))


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
