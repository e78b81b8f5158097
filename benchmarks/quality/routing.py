"""Entropy of a routing, and distance of two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

Routing = Mapping[str, np.ndarray]
"""Routing frequency phi [N] by layer name."""


def entropy(phi: np.ndarray) -> float:
    """Normalised entropy of the routing of a layer: 1 if all experts are used equally."""
    return float(stats.entropy(phi, base=len(phi)))


def distance(first: Routing, second: Routing) -> float:
    """Total variation between two routings, mean over layers: 0 equal, 1 disjoint."""
    return float(
        np.mean(
            [
                0.5 * np.abs(phi / phi.sum() - second[name] / second[name].sum()).sum()
                for name, phi in first.items()
            ]
        )
    )
