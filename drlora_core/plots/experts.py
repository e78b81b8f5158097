"""Which experts of a layer figures highlight; the others are a band."""

from __future__ import annotations

import numpy as np

from drlora_core.errors import check_layer
from drlora_core.runs import Run

HIGHLIGHTED = 5


def highlighted(run: Run, layer: str) -> list[int]:
    """Return the experts that ended with the most rank, at most five, all above the mean.

    Of those with the same rank, the ones that got there first.

    Raises:
        UnknownLayerError: naming close names.
    """
    check_layer(layer, run.layers)
    final, held = (ranks[run.places[layer]] for ranks in (run.final, run.ranks.sum(axis=0)))
    order = np.lexsort((-held, -final))[:HIGHLIGHTED]
    return [int(expert) for expert in order if final[expert] > final.mean()]


def others(run: Run, layer: str) -> list[int]:
    """Return the other experts: at least one, since not all can be above their mean."""
    chosen = set(highlighted(run, layer))
    return [expert for expert in range(run.layers[layer]) if expert not in chosen]
