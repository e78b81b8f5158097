"""Figure: how many experts ended at each rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.plots.style import BLUE, base_layout, make_figure
from drlora_core.runs import Drawable, as_run


def rank_histogram(run: Drawable) -> Any:
    """Draw how many experts ended at each rank."""
    run = as_run(run)
    values, counts = np.unique(run.final, return_counts=True)
    bars = {
        "type": "bar",
        "x": values,
        "y": counts,
        "marker": {"color": BLUE},
        "hovertemplate": "rank %{x}: %{y:,} experts<extra></extra>",
    }
    layout = base_layout("Experts by final rank", "rank", "experts")
    layout["xaxis"]["range"] = [-0.7, max(1, int(values[-1])) + 0.7]
    return make_figure([bars], layout)
