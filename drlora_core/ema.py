"""Exponential moving averages with bias correction.

Shapes: N experts; a count is one number or an int64 array [N].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BLOCK = 4096
"""Experts that are updated at once. The memory of a larger temporary array goes back to the system
each time, and to get it again takes longer than the arithmetic."""


def update(average: FloatArray, sample: FloatArray, decay: float) -> None:
    """Set average to decay * average + (1 - decay) * sample, in place (float64, any shape)."""
    for start in range(0, len(average), BLOCK):
        part = slice(start, start + BLOCK)
        view = average[part]
        view *= decay
        view += (1.0 - decay) * sample[part]


def correct_bias(average: FloatArray, count: int | IntArray, decay: float) -> FloatArray:
    """Correct the bias of an average that started at 0: average / (1 - decay^count), or 0.

    Example:
        >>> correct_bias(np.array([0.1, 0.0]), np.array([1, 0]), decay=0.9).tolist()
        [1.0000000000000002, 0.0]
    """
    return average / _bias(np.asarray(count), decay)


def _bias(count: IntArray, decay: float) -> FloatArray:
    """Return 1 - decay^count, infinite for count 0."""
    most = count.max(initial=0)
    if count.size > most + 1:  # counts repeat: one power for each is enough
        return _bias(np.arange(most + 1), decay)[count]
    weight = 1.0 - decay ** count.astype(np.float64)
    return np.where(weight > 0.0, weight, np.inf)
