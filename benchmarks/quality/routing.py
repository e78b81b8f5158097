"""How concentrated a routing is, and how far two are apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

Routing = Mapping[str, np.ndarray]
"""Routing frequency phi [N] by layer name, as ``evaluation.profile`` measures it."""


def entropy(phi: np.ndarray) -> float:
    """Return the entropy of a layer's routing, 1 for an even use of all experts."""
    return float(stats.entropy(phi, base=len(phi)))


def distance(first: Routing, second: Routing) -> float:
    """Return the total variation between two routings: 0 the same, 1 disjoint; mean of layers."""
    return float(
        np.mean(
            [
                0.5 * np.abs(phi / phi.sum() - second[name] / second[name].sum()).sum()
                for name, phi in first.items()
            ]
        )
    )
