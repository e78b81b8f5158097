"""Figure: the ranks of one layer's experts over the steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.ema import IntArray
from drlora_core.plots.experts import highlighted, others
from drlora_core.plots.style import (
    COLORS,
    GRAY,
    band,
    harmless,
    make_figure,
    step_layout,
    step_values,
)
from drlora_core.runs import Drawable, Run, as_run


def trajectories(run: Drawable, layer: str) -> Any:
    """Draw the ranks of a layer's experts over the steps.

    The experts that ended with the most rank are lines; the others are a band from the smallest to
    the largest rank, and their mean.

    Raises:
        UnknownLayerError: naming close names.
    """
    run = as_run(run)
    lines, rest = highlighted(run, layer), others(run, layer)
    ranks = run.ranks[:, run.places[layer]]
    what = f"the other {len(rest)}" if lines else f"all {len(rest)}"
    data = _draw_range(run, ranks[:, rest], what) if rest else []
    for color, expert in zip(COLORS, lines, strict=False):
        data.append(
            {
                "type": "scatter",
                **step_values(run, ranks[:, expert]),
                "name": f"expert {expert}",
                "mode": "lines",
                "line": {"shape": "hv", "color": color, "width": 2.5},
                "hovertemplate": f"expert {expert}<br>step %{{x}}: rank %{{y}}<extra></extra>",
            }
        )
    return make_figure(data, step_layout(f"Ranks of layer {harmless(layer)}", "rank", run))


def _draw_range(run: Run, ranks: IntArray, what: str) -> list[dict[str, Any]]:
    """Draw the range and the mean of ranks [K + 1, N]."""
    mean = step_values(run, ranks.mean(axis=1))
    low, high = (step_values(run, edge(ranks, axis=1))["y"] for edge in (np.min, np.max))
    line = {
        "type": "scatter",
        **mean,
        "name": f"{what}: mean",
        "mode": "lines",
        "line": {"shape": "hv", "color": GRAY, "width": 2, "dash": "dash"},
        "hovertemplate": f"{what}<br>step %{{x}}: mean rank %{{y:.2f}}<extra></extra>",
    }
    return [*band(mean["x"], low, high, shape="hv", name=f"{what}: range"), line]
