"""Cut the least important rank dimensions (after AdaLoRA): policies ``prune`` and ``move``.

The kept dimensions close the gaps, so an engine renumbers them at every event; in a recording, a
dimension keeps the number that it started with. An order [N, R] translates: dimension j of expert
i in the engine is dimension ``order[i, j]`` of the recording. The first r_i entries of a row are
the active dimensions; a dimension that grows takes the next entry. So it has a number that was
never used as long as there is one, and then that of the dimension that was cut first.

Shapes: N experts, R = r_max rank dimensions; the first r_i columns of row i are active.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drlora_core.ema import FloatArray, IntArray
from drlora_core.saliency import active_dimensions


def least_important(
    scores: FloatArray, ranks: IntArray, count: int, keep: int | IntArray = 1
) -> NDArray[np.bool_]:
    """Choose exactly ``count`` active dimensions to cut; every expert keeps its best ``keep``.

    The lowest scores are cut first. Ties are cut in this order: larger rank of the expert, later
    dimension, later expert. (AdaLoRA compares with a threshold instead: when all scores tie, it
    keeps 0 of a budget of 6.) ``scores`` are float64 [N, R], ``keep`` is a number for
    all or int64 [N], and ``count`` is at most the number of the other dimensions. Returns bool
    [N, R], True where a dimension is cut.
    """
    active = active_dimensions(ranks, scores.shape[1])
    best_first = np.argsort(np.where(active, -scores, np.inf), axis=1, kind="stable")
    candidates = np.empty_like(active)
    others = ~active_dimensions(np.broadcast_to(keep, ranks.shape), scores.shape[1])
    np.put_along_axis(candidates, best_first, others, axis=1)
    candidates &= active
    experts, dimensions = np.nonzero(candidates)
    order = np.lexsort((-experts, -dimensions, -ranks[experts], scores[experts, dimensions]))
    first = order[:count]
    cut = np.zeros(scores.shape, dtype=np.bool_)
    cut[experts[first], dimensions[first]] = True
    return cut


def compact(values: FloatArray, cut: NDArray[np.bool_]) -> FloatArray:
    """Move the kept columns to the front, in order, and fill the rest with zeros."""
    order = np.argsort(cut, axis=1, kind="stable")
    return np.take_along_axis(np.where(cut, 0.0, values), order, axis=1)


def initial_order(num_experts: int, r_max: int) -> IntArray:
    """Order before any cut, int64 [N, R]."""
    return np.tile(np.arange(r_max, dtype=np.int64), (num_experts, 1))


def follow(order: IntArray, cut: NDArray[np.bool_]) -> IntArray:
    """Order after a cut (bool [N, R], numbered as before it): kept dimensions come first.

    Example:
        >>> follow(initial_order(1, 4), np.array([[True, False, True, False]])).tolist()
        [[1, 3, 0, 2]]
    """
    return np.take_along_axis(order, np.argsort(cut, axis=1, kind="stable"), axis=1)


def to_recorded(sample: FloatArray, ranks: IntArray, order: IntArray) -> FloatArray:
    """Renumber an engine's sample [N, R] as at the start; NaN for inactive dimensions."""
    recorded = np.empty_like(sample)
    active = active_dimensions(ranks, sample.shape[1])
    np.put_along_axis(recorded, order, np.where(active, sample, np.nan), axis=1)
    return recorded
