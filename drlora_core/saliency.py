"""Saliency of experts, by which the greedy allocation orders them.

Shapes: N experts, R = r_max rank dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    An expert of rank 0 has the mean 0.
    """
    mean: FloatArray = masked_importance.sum(axis=1) / np.maximum(ranks, 1)
    return mean


def importance_at_zero(
    routing: FloatArray, importance: FloatArray, known: NDArray[np.bool_], sizes: Sequence[int]
) -> FloatArray:
    """Give experts without a rank dimension an importance: their share of f, as others have it.

    g_i = f_i * (sum of g / sum of f over the experts of the layer whose g is known), so that g per
    unit of f is their mean, weighted by f; g_i = f_i where nothing is known of a layer, or where
    all that is known of f or of g is 0.

    Args:
        routing: f, [E].
        importance: g, [E]; not read where it is not known.
        known: False for experts of rank 0, and for those without a sample since they grew, [E].
        sizes: experts of each layer.

    Returns:
        g of every expert as if it had rank 0, [E].

    Example:
        >>> f, g = np.array([0.5, 0.25, 0.25]), np.array([3.0, 1.5, 0.0])
        >>> importance_at_zero(f, g, np.array([True, True, False]), [3]).tolist()
        [3.0, 1.5, 1.5]
    """
    starts: IntArray = np.cumsum(sizes) - np.array(sizes)
    of_known = [np.where(known, values, 0.0) for values in (importance, routing)]
    total, visits = (np.add.reduceat(values, starts) for values in of_known)
    # f of experts that are no longer visited decays to almost 0: the quotient must stay finite.
    comparable = (total > 0.0) & (visits > total * np.finfo(np.float64).tiny)
    unit = np.divide(total, visits, out=np.ones_like(total), where=comparable)
    of_zero: FloatArray = routing * np.repeat(unit, sizes)
    return of_zero
