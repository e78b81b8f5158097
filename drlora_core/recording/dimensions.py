"""Identity of rank dimensions while policy ``prune`` cuts some and closes the gaps.

A recording numbers the dimensions of an expert as at the start. The engine renumbers the kept ones
at every event: its dimension j of expert i is dimension ``order[i, j]`` of the recording.

Shapes: E experts, R rank dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drlora_core.ema import FloatArray, IntArray
from drlora_core.saliency import active_dimensions


def initial_order(num_experts: int, r_max: int) -> IntArray:
    """Order before any cut, int64 [E, R]."""
    return np.tile(np.arange(r_max, dtype=np.int64), (num_experts, 1))


def follow(order: IntArray, cut: NDArray[np.bool_]) -> IntArray:
    """Order after a cut (bool [E, R], numbered as before it): kept dimensions come first.

    Example:
        >>> follow(initial_order(1, 4), np.array([[True, False, True, False]])).tolist()
        [[1, 3, 0, 2]]
    """
    return np.take_along_axis(order, np.argsort(cut, axis=1, kind="stable"), axis=1)


def to_recorded(sample: FloatArray, ranks: IntArray, order: IntArray) -> FloatArray:
    """Renumber an engine's sample [E, R] as at the start; NaN for inactive dimensions."""
    recorded = np.empty_like(sample)
    active = active_dimensions(ranks, sample.shape[1])
    np.put_along_axis(recorded, order, np.where(active, sample, np.nan), axis=1)
    return recorded


def from_recorded(recorded: FloatArray, order: IntArray) -> FloatArray:
    """Renumber a recorded sample [E, R] as in an engine after the cuts of ``order``."""
    return np.take_along_axis(recorded, order, axis=1)
