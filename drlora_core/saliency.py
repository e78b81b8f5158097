"""Saliency of experts, by which the greedy allocation orders them.

Shapes: N experts, R = r_max rank dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drlora_core.ema import FloatArray, IntArray


def saliency(
    routing: FloatArray, importance: FloatArray, ranks: IntArray, gamma: float
) -> FloatArray:
    """S_i = f_i * g_i / (r_i + 1)^gamma, [N] (DR-LoRA, arXiv 2601.04823).

    Example:
        >>> saliency(np.array([0.5, 0.5]), np.array([2.0, 2.0]), np.array([1, 3]), 1.0).tolist()
        [0.5, 0.25]
    """
    scores: FloatArray = routing * importance / (ranks + 1.0) ** gamma
    return scores


def active_dimensions(ranks: IntArray, r_max: int) -> NDArray[np.bool_]:
    """Bool [N, R]: the first r_i columns of row i are True."""
    active: NDArray[np.bool_] = np.arange(r_max) < ranks[:, None]
    return active


def mask_inactive(dimension_importance: FloatArray, ranks: IntArray) -> FloatArray:
    """Set s_j of inactive dimensions to 0, whatever it was, [N, R]."""
    return np.where(
        active_dimensions(ranks, dimension_importance.shape[1]), dimension_importance, 0.0
    )


def mean_over_active(masked_importance: FloatArray, ranks: IntArray) -> FloatArray:
    """Mean of s_j over each expert's active dimensions, [N, R] -> [N]; the others hold 0.

    An expert without rank has mean 0.
    """
    mean: FloatArray = masked_importance.sum(axis=1) / np.maximum(ranks, 1)
    return mean
